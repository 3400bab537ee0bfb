package explain

import (
	"strings"
	"sync"
)

// family is what of a build tells which earlier records are of its steps.
type family struct {
	project string
	known   bool // the client says what project it is

	mu      sync.Mutex      // guards the fields below; taken last
	texts   map[uint64]bool // hashes of what its steps say, and whether it is their own
	own     int             // how many of these are
	claimed map[uint64]int  // how many of its steps have a hash
	kin     map[string]kinship
}

// kinship says whether an earlier build is kin.
type kinship struct {
	is bool
	at int // how many texts of the family were compared
}

// stale: the family has grown by so much that it is to be compared again. As it
// is always by an eighth, a family of any size is compared a few times.
func (k kinship) stale(texts int) bool { return 8*(texts-k.at) > k.at }

// add takes in a step of the build.
func (f *family) add(s step) {
	f.mu.Lock()
	defer f.mu.Unlock()
	text := hash(s.Text)
	if _, is := f.texts[text]; !is {
		f.texts[text] = s.own()
		f.own += boolInt(s.own())
	}
	f.claimed[s.hash()]++
}

// likeness says how a record came to be taken for the same step, the best
// first.
type likeness int

const (
	identical        likeness = iota // nothing differs
	sameText                         // the same instruction of the same stage
	moved                            // the same instruction in another stage
	samePlace                        // what now stands where it stood
	perhapsSamePlace                 // the same, as far as stages are named
	edited                           // the same sort of step, where places aren't known
	unlike
)

// candidate is a record that may be of the same step as another.
type candidate struct {
	*record
	diff     difference
	distance int // how much differs
	like     likeness
	home     bool // it is of the same project, for sure
	kin      bool // its build had much in common with this one
	here     bool // it stood where the step stands
	twins    bool // the build has several steps that only their place would tell apart, and no places
}

// sure reports whether it is of the same step. Projects may be copies of one
// another, so that steps of the same text say nothing alone.
func (c candidate) sure() bool {
	return c.like == identical || c.home && !c.twins && (c.like == sameText || c.kin && c.like < perhapsSamePlace)
}

// nearest finds the record of the same step that differs least from rec: of the
// same project if possible, of those that are as alike the one with the fewest
// differences, of these the one that stood there, and otherwise the newest. It
// reports false if none can be meant.
func (j *Journal) nearest(rec *record, f *family) (best candidate, ok bool) {
	j.settle()
	j.mu.Lock()
	defer j.mu.Unlock()
	j.readyLocked()
	j.searches++
	twins := f.twins(rec.Step)
	for _, l := range rec.lists(make([]list, 0, names+1)) {
		if ok && l.by == byPlace && best.settled(f) {
			break
		}
		var looked [2]int // at those of other projects, and of this one
		own := boolInt(f.known)
		for old := j.index[l.by][l.name]; old != nil && looked[own] < maxAlike; old = old.beside[l.by].older {
			if ok && old.id < best.id && best.unbeaten(rec, f) {
				break
			}
			home := f.known && old.Project == f.project
			if old.search == j.searches || looked[boolInt(home)] == maxAlike {
				continue
			}
			old.search = j.searches
			if c, is := j.candidateLocked(rec, old, f); is {
				looked[boolInt(home)]++
				if c.twins = twins; !ok || c.nearer(best) {
					best, ok = c, true
				}
			}
		}
	}
	return best, ok
}

// unbeaten: nothing that is older is nearer to rec. What differs in nothing is
// looked at first.
func (c candidate) unbeaten(rec *record, f *family) bool {
	nearest := c.like == identical && c.distance == 0 || c.like == sameText && c.distance == 1
	return nearest && c.kin && (c.home || !f.known) && (c.here || rec.Step.Index == 0)
}

// maxAlike bounds how many records of one name are compared with a step, of its
// project and of others: the newest. It is enough for all that a step has been
// of late; a build may have thousands that say the same.
const maxAlike = 32

// candidateLocked compares old with rec. It reports false if it can't be of the
// same step.
func (j *Journal) candidateLocked(rec, old *record, f *family) (c candidate, ok bool) {
	c = candidate{record: old, like: f.likeness(rec.Step, old.Step), home: f.known && old.Project == f.project, here: rec.Step.samePlace(old.Step)}
	if c.like == unlike && rec.Op != old.Op {
		return c, false
	}
	c.kin = j.kinLocked(old.Build, c.home, f)
	if c.diff = compare(rec, old); rec.Op == old.Op && c.diff.none() {
		c.like = identical
	} else if c.like == unlike || !c.kin && !c.home {
		return c, false
	}
	if c.like == edited && 2*len(c.diff.facets) > len(rec.Facets) {
		return c, false // there is too little that they have in common
	}
	c.distance = c.diff.size() + contentDistance(rec, old)
	return c, true
}

// settled reports whether no list after that of the text has a nearer one: these
// are of what stands in the same place, whatever it says.
func (c candidate) settled(f *family) bool {
	return c.like <= moved && c.kin && (c.home || !f.known)
}

// names are how many foundBy has, and byPlace is which of them is the place.
const (
	names   = 3
	byPlace = 1
)

// foundBy are hashes of the names under which the journal finds a record: what
// it is and was given, where it stands, and what it says. Steps that stand
// nowhere are found by their kind. Who is found is looked at: hashes may be equal
// by chance.
func (r *record) foundBy() [names]uint64 {
	same := hash("same", r.Op)
	for _, in := range r.Inputs {
		same = hashMore(same, in.name())
	}
	return [names]uint64{same, r.Step.place(), hash("text", r.Step.Kind, r.Step.Text)}
}

// list is of records that have the same name, by one of foundBy.
type list struct {
	by   int
	name uint64
}

// lists are where records of the same step are, the places after the others. They
// are appended to out.
func (r *record) lists(out []list) []list {
	for by, name := range r.foundBy() {
		if by != byPlace {
			out = append(out, list{by, name})
		}
	}
	out = append(out, list{byPlace, r.Step.place()})
	if other, ok := r.Step.otherPlace(); ok {
		out = append(out, list{byPlace, other})
	}
	return out
}

// name is the same for inputs that are the same, mostly.
func (f inputFact) name() string {
	if f.Content != "" || len(f.Keys) == 0 {
		return f.Content
	}
	return f.Keys[0]
}

// hash is FNV-1a of words, each ended by a NUL.
func hash(words ...string) uint64 {
	h := uint64(14695981039346656037)
	for _, w := range words {
		h = hashMore(h, w)
	}
	return h
}

// hashMore is the hash of words and w, of which h is that of words.
func hashMore(h uint64, w string) uint64 {
	const prime = 1099511628211
	for i := range len(w) {
		h = (h ^ uint64(w[i])) * prime
	}
	return h * prime
}

func (c candidate) nearer(than candidate) bool {
	switch {
	case (c.like == identical) != (than.like == identical):
		return c.like == identical
	case c.home != than.home:
		return c.home
	case c.kin != than.kin:
		return c.kin
	case c.like != than.like:
		return c.like < than.like
	case c.distance != than.distance:
		return c.distance < than.distance
	case c.here != than.here:
		return c.here
	}
	return c.Time > than.Time || c.Time == than.Time && c.id > than.id
}

// likeness says how was may be the step that is now another.
func (f *family) likeness(now, was step) likeness {
	like := unlike
	switch {
	case now.Text == was.Text && now.Stage == was.Stage:
		return sameText
	case now.Text == was.Text:
		like = moved
	case now.samePlace(was):
		like = samePlace
	case now.perhapsSamePlace(was):
		like = perhapsSamePlace
	case now.Index == 0 && was.Index == 0 && now.alike(was):
		like = edited
	}
	if like < unlike && f.has(was) {
		return unlike // it is another step of this build
	}
	return like
}

// allTexts are at most n.
func (f *family) allTexts(n int) []uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]uint64, 0, min(n, len(f.texts)))
	for t := range f.texts {
		if len(out) == n {
			break
		}
		out = append(out, t)
	}
	return out
}

// has reports whether the build has the step, wherever in its stage.
func (f *family) has(s step) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.claimed[s.hash()] > 0
}

// twins reports whether the build has several steps such as s that aren't
// numbered.
func (f *family) twins(s step) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return s.Index == 0 && f.claimed[s.hash()] > 1
}

// hash names s wherever it stands in its stage.
func (s step) hash() uint64 { return hash(s.Kind, s.Stage, s.Text) }

// own reports whether s tells something of its build. Projects that have nothing
// to do with each other have base images in common, and what frontends prepare.
func (s step) own() bool {
	return s.keyword() != "FROM" && s.Kind != "docker-image" && s.Kind != "oci-layout" && !strings.HasPrefix(s.Text, "[internal] ")
}

// kinLocked reports whether at least half of the build's steps were in the earlier
// build, too; of its own ones, unless that one is of the same project (home).
// Where the client says that it is another, a few steps that many have, such as
// COPY . ., are no evidence of a copy.
func (j *Journal) kinLocked(earlier string, home bool, f *family) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if k, known := f.kin[earlier]; known && !k.stale(len(f.texts)) {
		return k.is
	}
	counts := func(text uint64) bool {
		own, is := f.texts[text]
		return is && (own || home)
	}
	all, common, least := len(f.texts), 0, 1
	if !home {
		all = f.own
	}
	if !home && f.known {
		least = 3
	}
	if b := j.builds[earlier]; b != nil {
		for _, t := range b.Texts {
			common += boolInt(counts(t))
		}
	}
	k := kinship{is: common >= least && 2*common >= all, at: len(f.texts)}
	f.kin[earlier] = k
	return k.is
}

// byKey is the last record of a step one of whose results had one of the keys.
func (j *Journal) byKey(keys []string) *record {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.readyLocked()
	for _, k := range keys {
		if rec := j.keys[k]; rec != nil {
			return rec
		}
	}
	return nil
}
