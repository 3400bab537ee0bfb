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
	"fmt"
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
	// stepsBucket holds the records of each build, in the order in which builds
	// ended.
	stepsBucket = "explain.steps"
	// buildsBucket holds explained builds, by ref.
	buildsBucket = "explain.builds"
)

// bounds are how many records and builds are kept, the newest.
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
	keeping sync.WaitGroup // keepWaiting
	// closing: nobody asks any more, so that what is kept is only stored.
	closing atomic.Bool

	mu       sync.Mutex                // guards the fields below
	waiting  []func()                  // keep builds that have ended; the first one is being run
	ended    int                       // builds
	kept     int                       // of these
	progress *sync.Cond                // kept has changed
	builds   map[string]*build         // by short of the ref, without their steps; nil until they are read
	order    []*build                  // these, by when they ended
	next     uint64                    // number of the next entry in stepsBucket; read with builds
	stored   int                       // records in stepsBucket, those that nobody needs included; read with builds
	records  []*record                 // all, the newest at the end; nil where one was dropped
	first    uint64                    // the id of the first one
	live     int                       // those that weren't dropped
	index    [names]map[uint64]*record // for each of foundBy the newest record; it leads to others
	keys     map[string]*record        // the last one that made a result of that key
	searches uint64                    // for the nearest record
	rests    bool                      // the stored records aren't in the three fields above, which are empty
}

// build is an explained build as it is stored.
type build struct {
	explanation.Build
	// Texts are hashes of the steps that the build had, whether they ran or
	// not; Args are its build arguments, each with the short of its value.
	Texts []uint64
	Args  map[string]string
}

// Open returns the journal in cfg.Store. What is in it is read when it is needed.
func Open(cfg Config) *Journal {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	j := &Journal{cfg: cfg, bounds: defaultBounds}
	j.restLocked()
	j.progress = sync.NewCond(&j.mu)
	return j
}

// Rest holds no memory any more for what is known of steps: the next one that is
// explained has it read again.
func (j *Journal) Rest() {
	j.settle()
	j.mu.Lock()
	defer j.mu.Unlock()
	j.restLocked()
}

func (j *Journal) restLocked() {
	j.index = [names]map[uint64]*record{{}, {}, {}}
	j.keys, j.records, j.live, j.rests = map[string]*record{}, nil, 0, true
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
	j.settle()
	data, ok := j.cfg.Store.Get(buildsBucket, j.refOf(ref))
	if !ok {
		return explanation.Build{}, false
	}
	b, err := unpackBuild(data)
	if err != nil {
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
	j.readyBuildsLocked()
	if len(j.order) == 0 {
		return ""
	}
	return j.order[len(j.order)-1].Ref
}

// Forget drops the explanation of a build; what is known of its steps stays.
func (j *Journal) Forget(ref string) {
	j.settle()
	j.mu.Lock()
	defer j.mu.Unlock()
	j.readyBuildsLocked()
	var b store.Batch
	j.forgetLocked(ref, &b)
	j.cfg.Store.Write(&b)
}

func (j *Journal) forgetLocked(ref string, b *store.Batch) {
	if known := j.builds[short(ref)]; known != nil {
		delete(j.builds, short(ref))
		i := slices.Index(j.order, known)
		j.order = slices.Delete(j.order, i, i+1)
	}
	b.Delete(buildsBucket, ref)
}

// readyLocked reads the records that are stored, if they aren't known. What can't
// be read is dropped with a word in the log.
func (j *Journal) readyLocked() {
	j.readyBuildsLocked()
	if !j.rests {
		return
	}
	j.rests = false
	var bad damaged
	j.cfg.Store.Scan(stepsBucket, "", func(id string, data []byte) bool {
		_, err := parseID(id)
		var records []*record
		if err == nil {
			records, err = unpackRecords(data)
		}
		if err != nil {
			bad.drop(stepsBucket, id, err)
			j.stored -= countRecords(data)
			return true
		}
		j.learnLocked(records)
		return true
	})
	j.tidyLocked(nil, &bad.Batch) // what was stored without being looked at isn't bounded
	bad.tell(j.cfg.Log)
	j.cfg.Store.Write(&bad.Batch)
}

// readyBuildsLocked is the same for builds.
func (j *Journal) readyBuildsLocked() {
	if j.builds != nil {
		return
	}
	j.builds = map[string]*build{}
	j.cfg.Store.Scan(stepsBucket, "", func(id string, data []byte) bool {
		if n, err := parseID(id); err == nil {
			j.next = max(j.next, n+1)
		}
		j.stored += countRecords(data)
		return true
	})
	var bad damaged
	j.cfg.Store.Scan(buildsBucket, "", func(ref string, data []byte) bool {
		b, err := unpackBuild(data)
		if err != nil || b.Ref != ref {
			bad.drop(buildsBucket, ref, cmp.Or(err, errDamaged))
			return true
		}
		j.knowLocked(b)
		return true
	})
	slices.SortStableFunc(j.order, func(a, b *build) int { return a.Ended.Compare(b.Ended) })
	bad.tell(j.cfg.Log)
	j.cfg.Store.Write(&bad.Batch)
}

// damaged are entries that can't be read. Another version of the daemon may have
// written thousands.
type damaged struct {
	store.Batch
	entries int
	err     error // why not the last one
}

func (d *damaged) drop(bucket, key string, err error) {
	d.Delete(bucket, key)
	d.entries++
	d.err = fmt.Errorf("%s %q: %w", bucket, key, err)
}

func (d *damaged) tell(log *slog.Logger) {
	if d.entries > 0 {
		log.Warn("what is kept to explain builds can't be read in part, and is dropped", "entries", d.entries, "err", d.err)
	}
}

// knowLocked keeps what other builds may ask of b, the last one that ended. Its
// steps are read from the store again when somebody wants to see them.
func (j *Journal) knowLocked(b *build) {
	b.Steps = nil
	j.builds[short(b.Ref)] = b
	j.order = append(j.order, b)
}

// shareLocked makes rec share its origin with the record before it, which mostly
// is of the same build.
func (j *Journal) shareLocked(rec *record) {
	if len(j.records) == 0 {
		return
	}
	if last := j.records[len(j.records)-1]; last != nil && *rec.Origin == *last.Origin {
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
	rec.id = j.first + uint64(len(j.records))
	j.records = append(j.records, rec)
	j.live++
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

// keep adds an explained build and the records of its steps, and drops what is
// beyond the bounds: all in one change of the store. While the journal rests or is
// being closed records are stored without being looked at; who reads them next
// does.
func (j *Journal) keep(b *build, records []*record) {
	var batch store.Batch
	records = records[max(0, len(records)-j.bounds.records):] // earlier ones would go at once
	records = slices.DeleteFunc(records, func(rec *record) bool {
		err := rec.fit()
		if err != nil {
			// The explanation of the next run says so (unknown).
			j.cfg.Log.Debug("a step isn't kept for later explanations", "build", b.Ref, "step", rec.Step.name(), "err", err)
		}
		return err != nil
	})
	packed, err := b.pack()
	j.mu.Lock()
	defer j.mu.Unlock()
	j.readyBuildsLocked()
	if j.rests || j.closing.Load() {
		j.storeLocked(records, &batch)
	} else {
		j.learnLocked(records)
		j.tidyLocked(records, &batch)
	}
	if err != nil {
		j.cfg.Log.Warn("the explanation of a build is lost", "build", b.Ref, "err", err)
	} else {
		batch.Put(buildsBucket, b.Ref, packed)
		j.knowLocked(b)
	}
	for len(j.order) > j.bounds.builds {
		j.forgetLocked(j.order[0].Ref, &batch)
	}
	j.cfg.Store.Write(&batch)
}

// storeLocked writes records as the newest entry.
func (j *Journal) storeLocked(records []*record, batch *store.Batch) {
	if len(records) == 0 {
		return
	}
	data, err := packRecords(records)
	if err != nil {
		j.cfg.Log.Warn("steps aren't kept for later explanations", "steps", len(records), "err", err)
		return
	}
	batch.Put(stepsBucket, fmtID(j.next), data)
	j.next++
	j.stored += len(records)
}

// learnLocked takes in records, the newest ones, each in place of what says the
// same. In the store that stays: who reads both drops it again.
func (j *Journal) learnLocked(records []*record) {
	for _, rec := range records {
		j.shareLocked(rec)
		j.replaceLocked(rec)
		j.addLocked(rec)
	}
}

// tidyLocked drops the records beyond the bounds, and stores those that are new.
// When the store would hold twice as many as the bound, those that are left are
// written anew, and nothing else stays.
func (j *Journal) tidyLocked(added []*record, batch *store.Batch) {
	for len(j.records) > 0 && (j.live > j.bounds.records || j.records[0] == nil) {
		if j.records[0] != nil {
			j.dropLocked(j.records[0])
		}
		j.records, j.first = j.records[1:], j.first+1
	}
	if j.stored+len(added) <= 2*j.bounds.records {
		j.storeLocked(added, batch)
		return
	}
	j.cfg.Store.Scan(stepsBucket, "", func(id string, _ []byte) bool {
		batch.Delete(stepsBucket, id)
		return true
	})
	dropped := func(rec *record) bool { return rec == nil }
	j.records, j.first, j.stored = slices.DeleteFunc(j.records, dropped), 0, 0
	for i, rec := range j.records {
		rec.id = uint64(i)
	}
	for some := range slices.Chunk(j.records, 512) {
		j.storeLocked(some, batch)
	}
}

func fmtID(n uint64) string {
	s := strconv.FormatUint(n, 16)
	return strings.Repeat("0", 16-len(s)) + s
}

func parseID(s string) (uint64, error) { return strconv.ParseUint(s, 16, 64) }

// replaceLocked drops the record that rec says the same as, and more.
func (j *Journal) replaceLocked(rec *record) {
	for old := j.index[0][rec.foundBy()[0]]; old != nil; old = old.beside[0].older {
		if old.Project == rec.Project && old.Step == rec.Step && compare(rec, old).none() {
			j.dropLocked(old)
			return
		}
	}
}

func (j *Journal) dropLocked(rec *record) {
	j.removeLocked(rec)
	j.records[rec.id-j.first] = nil
	j.live--
}
