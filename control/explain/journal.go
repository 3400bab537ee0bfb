// Package explain finds out why the steps of a build ran, and keeps the answers.
//
// A Recorder watches one build. Of every step that runs it makes a record: what
// identifies the step by its definition, value by value, what its inputs were,
// and a summary of the files that it reads. The Journal keeps records of many
// builds. The record nearest to a step that runs, that of the same step with
// the fewest differences, tells what changed (nearest.go, compare.go); where
// that is the result of another step, the search goes on there.
//
// A cause is certain if two records were compared and it is what differs. It is
// only probable if it isn't sure that they are of the same step.
//
// Nothing here holds up a build: records are made and compared while the step
// runs, and written after the build has ended. A step that can't be explained
// is no error of its build.
//
// Locks: Recorder.mu before Journal.mu. Neither is held during I/O.
package explain

import (
	"cmp"
	"log/slog"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/internal/explanation"
	"github.com/kilnbuild/kiln/internal/store"
)

const (
	// stepsBucket holds records, by the order in which they were made.
	stepsBucket = "explain.steps"
	// buildsBucket holds explained builds, by ref.
	buildsBucket = "explain.builds"
)

// bounds are how many records and builds are kept, of those used last.
type bounds struct{ records, builds int }

// defaultBounds make some 3 MB of records.
var defaultBounds = bounds{records: 4096, builds: 256}

// Evictions knows what was removed from the cache: *cache.Manager.
type Evictions interface {
	Evicted(results ...string) map[string]cache.Eviction
}

// Config is what a Journal works with.
type Config struct {
	Store     *store.DB
	Evictions Evictions
	Log       *slog.Logger // nil discards
}

// Journal keeps what is known of steps that ran and of builds that were
// explained. Methods are safe for concurrent use.
type Journal struct {
	cfg     Config
	bounds  bounds
	load    sync.Once
	keeping sync.WaitGroup // keepWaiting
	// closing: nobody asks any more, so that what is kept is only stored.
	closing atomic.Bool

	mu       sync.Mutex                // guards the fields below
	waiting  []func()                  // keep builds that have ended; the first one is being run
	ended    int                       // builds
	kept     int                       // of these
	progress *sync.Cond                // kept has changed
	index    [names]map[uint64]*record // for each of foundBy the newest record; it leads to others
	keys     map[string]*record        // the last one that made a result of that key
	used     []*record                 // those used last at the end
	next     uint64                    // id of the next record
	builds   map[string]*build         // by short of the ref, without their steps
}

// build is an explained build as it is stored.
type build struct {
	explanation.Build
	// Texts are shorts of the steps that the build had, whether they ran or
	// not; Args are its build arguments, each with the short of its value.
	Texts []string          `json:"texts,omitempty"`
	Args  map[string]string `json:"args,omitempty"`
}

// Open returns the journal in cfg.Store. What is in it is read when a step is
// first explained.
func Open(cfg Config) *Journal {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	j := &Journal{cfg: cfg, bounds: defaultBounds, index: [names]map[uint64]*record{{}, {}, {}}, keys: map[string]*record{}, builds: map[string]*build{}}
	j.progress = sync.NewCond(&j.mu)
	return j
}

// Close waits until everything is handed to the store, after which nothing runs
// for the journal. It is called after the last build; nothing is explained
// afterwards.
func (j *Journal) Close() {
	j.closing.Store(true)
	j.keeping.Wait()
}

// settle waits until every build that has ended by now is kept.
func (j *Journal) settle() {
	j.mu.Lock()
	defer j.mu.Unlock()
	for last := j.ended; j.kept < last; {
		j.progress.Wait()
	}
}

// later runs fn, which keeps a build that has ended, after those of builds that
// ended before it. One goroutine does it for all.
func (j *Journal) later(fn func()) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.ended++
	j.waiting = append(j.waiting, fn)
	if len(j.waiting) == 1 {
		j.keeping.Go(j.keepWaiting)
	}
}

// keepWaiting runs what waits until nothing does.
func (j *Journal) keepWaiting() {
	j.mu.Lock()
	defer j.mu.Unlock()
	for len(j.waiting) > 0 {
		fn := j.waiting[0]
		j.mu.Unlock()
		func() {
			defer j.survive("keep an explanation")
			fn()
		}()
		j.mu.Lock()
		j.waiting[0] = nil
		j.waiting = j.waiting[1:]
		j.kept++
		j.progress.Broadcast()
	}
}

// survive keeps a defect in explaining from ending the daemon: it costs the
// explanation.
func (j *Journal) survive(what string) {
	if p := recover(); p != nil {
		j.cfg.Log.Error("internal error: "+what+" panicked", "panic", p, "stack", string(debug.Stack()))
	}
}

// Get returns the explanation of the build named ref, or with "" of the last
// one that ended. It reports false if there is none.
func (j *Journal) Get(ref string) (explanation.Build, bool) {
	j.ready()
	j.settle()
	data, ok := j.cfg.Store.Get(buildsBucket, j.refOf(ref))
	if !ok {
		return explanation.Build{}, false
	}
	var b build
	if err := unpack(data, &b); err != nil {
		j.cfg.Log.Warn("an explanation of a build can't be read", "build", ref, "err", err)
		return explanation.Build{}, false
	}
	return b.Build, true
}

// refOf is ref or, for "", that of the last build that ended.
func (j *Journal) refOf(ref string) string {
	if ref != "" {
		return ref
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	var last build
	for _, b := range j.builds {
		if b.Ended.After(last.Ended) {
			last = *b
		}
	}
	return last.Ref
}

// Forget drops the explanation of a build; what is known of its steps stays.
func (j *Journal) Forget(ref string) {
	j.ready()
	j.settle()
	j.mu.Lock()
	defer j.mu.Unlock()
	var b store.Batch
	j.forgetLocked(ref, &b)
	j.cfg.Store.Write(&b)
}

func (j *Journal) forgetLocked(ref string, b *store.Batch) {
	delete(j.builds, short(ref))
	b.Delete(buildsBucket, ref)
}

// ready reads what is stored. What can't be read is dropped with a word in the
// log.
func (j *Journal) ready() {
	j.load.Do(func() {
		j.mu.Lock()
		defer j.mu.Unlock()
		var bad store.Batch
		j.cfg.Store.Scan(stepsBucket, "", func(id string, data []byte) bool {
			var rec *record
			n, err := strconv.ParseUint(id, 16, 64)
			if err == nil {
				rec, err = unpackRecord(data)
			}
			if err != nil {
				j.cfg.Log.Warn("a record of a step can't be read and is dropped", "record", id, "err", err)
				bad.Delete(stepsBucket, id)
				return true
			}
			rec.id = n
			j.next = max(j.next, n+1)
			j.learnLocked(rec, &bad)
			return true
		})
		j.trimLocked(&bad) // a journal that was being closed didn't
		j.cfg.Store.Scan(buildsBucket, "", func(ref string, data []byte) bool {
			b := &build{}
			if err := unpack(data, b); err != nil || b.Ref != ref {
				j.cfg.Log.Warn("an explanation of a build can't be read and is dropped", "build", ref, "err", err)
				bad.Delete(buildsBucket, ref)
				return true
			}
			j.knowLocked(b)
			return true
		})
		j.cfg.Store.Write(&bad)
	})
}

// knowLocked keeps what other builds may ask of b. Its steps are read from the
// store again when somebody wants to see them.
func (j *Journal) knowLocked(b *build) {
	b.Steps = nil
	j.builds[short(b.Ref)] = b
}

// shareLocked makes rec share its origin with the record before it, which mostly
// is of the same build.
func (j *Journal) shareLocked(rec *record) {
	if len(j.used) == 0 {
		return
	}
	if last := j.used[len(j.used)-1]; *rec.Origin == *last.Origin {
		rec.Origin = last.Origin
	}
}

func (j *Journal) addLocked(rec *record) {
	for i, name := range rec.foundBy() {
		if old := j.index[i][name]; old != nil {
			rec.beside[i].older, old.beside[i].newer = old, rec
		}
		j.index[i][name] = rec
	}
	for _, k := range rec.Keys {
		j.keys[k] = rec
	}
	j.used = append(j.used, rec)
}

func (j *Journal) removeLocked(rec *record) {
	for i, name := range rec.foundBy() {
		older, newer := rec.beside[i].older, rec.beside[i].newer
		switch {
		case newer != nil:
			newer.beside[i].older = older
		case older != nil:
			j.index[i][name] = older
		default:
			delete(j.index[i], name)
		}
		if older != nil {
			older.beside[i].newer = newer
		}
	}
	for _, k := range rec.Keys {
		if j.keys[k] == rec {
			delete(j.keys, k)
		}
	}
}

// packed is a record, its stored form, or both.
type packed struct {
	*record
	data []byte
}

// complete makes what is missing of p, of which only the stored form has to be
// there if toStore.
func (p *packed) complete(toStore bool) (err error) {
	switch {
	case p.data == nil:
		p.data, err = p.record.pack()
	case !toStore:
		p.record, err = unpackRecord(p.data)
	}
	return err
}

// keep adds an explained build and the records of its steps, and drops what is
// beyond the bounds: all in one change of the store. While the journal is being
// closed records are stored without being looked at; who reads them next does.
func (j *Journal) keep(b *build, records []packed) {
	var batch store.Batch
	records = records[max(0, len(records)-j.bounds.records):] // earlier ones would go at once
	for i := range records {
		if err := records[i].complete(j.closing.Load()); err != nil {
			j.cfg.Log.Warn("a step isn't kept for later explanations", "build", b.Ref, "err", err)
			records[i].data = nil
		}
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, p := range records {
		if p.data == nil {
			continue
		}
		if p.record != nil {
			p.id = j.next
			j.learnLocked(p.record, &batch)
		}
		batch.Put(stepsBucket, fmtID(j.next), p.data)
		j.next++
	}
	j.trimLocked(&batch)
	if data, err := pack(b); err != nil {
		j.cfg.Log.Warn("the explanation of a build is lost", "build", b.Ref, "err", err)
	} else {
		batch.Put(buildsBucket, b.Ref, data)
		j.knowLocked(b)
	}
	j.trimBuildsLocked(&batch)
	j.cfg.Store.Write(&batch)
}

// learnLocked takes in a record, the newest one, in place of what says the same.
func (j *Journal) learnLocked(rec *record, batch *store.Batch) {
	j.shareLocked(rec)
	j.replaceLocked(rec, batch)
	j.addLocked(rec)
}

// trimLocked drops the records beyond the bounds.
func (j *Journal) trimLocked(batch *store.Batch) {
	for len(j.used) > j.bounds.records {
		old := j.used[0]
		j.used[0], j.used = nil, j.used[1:]
		j.removeLocked(old)
		batch.Delete(stepsBucket, fmtID(old.id))
	}
}

func fmtID(n uint64) string {
	s := strconv.FormatUint(n, 16)
	return strings.Repeat("0", 16-len(s)) + s
}

// replaceLocked drops the record that rec says the same as, and more.
func (j *Journal) replaceLocked(rec *record, batch *store.Batch) {
	for old := j.index[0][rec.foundBy()[0]]; old != nil; old = old.beside[0].older {
		if old.Project == rec.Project && old.Step == rec.Step && compare(rec, old).none() {
			j.dropLocked(old, batch)
			return
		}
	}
}

func (j *Journal) dropLocked(rec *record, batch *store.Batch) {
	j.removeLocked(rec)
	j.used = slices.DeleteFunc(j.used, func(r *record) bool { return r == rec })
	batch.Delete(stepsBucket, fmtID(rec.id))
}

// touchLocked notes that a record was of use, so that it is kept.
func (j *Journal) touchLocked(rec *record) {
	if i := slices.Index(j.used, rec); i >= 0 {
		j.used = append(slices.Delete(j.used, i, i+1), rec)
	}
}

func (j *Journal) trimBuildsLocked(batch *store.Batch) {
	for len(j.builds) > j.bounds.builds {
		var oldest *build
		for _, b := range j.builds {
			if oldest == nil || cmp.Or(b.Ended.Compare(oldest.Ended), cmp.Compare(b.Ref, oldest.Ref)) < 0 {
				oldest = b
			}
		}
		j.forgetLocked(oldest.Ref, batch)
	}
}
