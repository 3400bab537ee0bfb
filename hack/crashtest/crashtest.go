// Package crashtest runs builds against a real kilnd and takes it down in the
// middle of them, again and again, by kill -9 or by a power cut: its state
// directory lies on an ext4 file system of its own then, which is shut down
// without a flush and mounted again.
//
// After each time it wants: that fsck finds nothing wrong in what the daemon
// left, before anybody mends it; that the daemon starts soon; that nothing is
// mounted or runs any more; that every result is right, byte for byte; that no
// step runs again whose end a client was told longer than Bound before; and that
// what the daemon says to take on disk is there.
//
// What has been unused for a while is collected as garbage, in the midst of all
// that, so that the state stays as big as it is after a minute, however many
// rounds there are.
package crashtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/hack/harness"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Config says what to run.
type Config struct {
	Kilnd  string // the daemon's binary
	Dir    string // for state, sockets and results; empty, on a file system of any kind
	Rounds int
	Power  bool // cut the power rather than kill the daemon
	Damage bool // now and then damage or delete the database after the crash
	// Clients build at the same time; 0 is 4.
	Clients int
	// MaxLoad is the longest time of building before the end of a round; 0 is
	// 700 ms.
	MaxLoad time.Duration
	// MaxStart is from where on a start is a failure; 0 is 2 s. A machine that is
	// busy with other things needs more.
	MaxStart time.Duration
	// Bound is how old the news of a finished step must be for its result to be
	// durable: the group commit's delay, and time for two commits of the disk. 0 is
	// a second, enough for one that has nothing else to do.
	Bound time.Duration
	Seed  uint64
	Log   io.Writer // progress; nil is none
}

// Result is what came out.
type Result struct {
	Rounds, Builds   int
	Checked          int // steps that had to be there after a crash, and were
	Collected        int // records that were seen to go as garbage
	Starts           []time.Duration
	Rebuilds         []time.Duration // starts with a damaged database
	Failures         []string
	LastFsck         string
	InterruptedBuild int
}

// String sums it up.
func (r Result) String() string {
	out := fmt.Sprintf("%d rounds, %d builds finished, %d interrupted, %d finished steps were still there, %d records collected; %d starts: %s",
		r.Rounds, r.Builds, r.InterruptedBuild, r.Checked, r.Collected, len(r.Starts), spread(r.Starts))
	if len(r.Rebuilds) > 0 {
		out += fmt.Sprintf("; %d with a damaged database: %s", len(r.Rebuilds), spread(r.Rebuilds))
	}
	return fmt.Sprintf("%s; last fsck: %s; %d failures", out, r.LastFsck, len(r.Failures))
}

// spread describes durations.
func spread(all []time.Duration) string {
	s := slices.Clone(all)
	slices.Sort(s)
	at := func(q float64) time.Duration {
		if len(s) == 0 {
			return 0
		}
		return s[min(len(s)-1, int(q*float64(len(s))))].Round(time.Millisecond)
	}
	return fmt.Sprintf("median %s, 99%% %s, longest %s", at(0.5), at(0.99), at(1))
}

// run is a Run in progress.
type run struct {
	Config
	daemon *harness.Daemon
	disk   *disk // nil without Power
	rnd    *rand.Rand
	result Result
	jobs   *jobs
}

// Run does it. The error is about running, not about what is found.
func Run(ctx context.Context, cfg Config) (_ Result, err error) {
	if os.Geteuid() != 0 {
		return Result{}, errors.New("crash tests need root")
	}
	if cfg.Clients == 0 {
		cfg.Clients = 4
	}
	if cfg.MaxLoad == 0 {
		cfg.MaxLoad = 700 * time.Millisecond
	}
	if cfg.MaxStart == 0 {
		cfg.MaxStart = 2 * time.Second
	}
	if cfg.Bound == 0 {
		cfg.Bound = time.Second
	}
	if cfg.Log == nil {
		cfg.Log = io.Discard
	}
	r := &run{Config: cfg, rnd: rand.New(rand.NewPCG(cfg.Seed, 1))}
	if r.jobs, err = newJobs(cfg.Dir, kept); err != nil {
		return Result{}, err
	}
	defer r.jobs.close()
	root := filepath.Join(cfg.Dir, "state")
	if cfg.Power {
		if r.disk, err = newDisk(cfg.Dir); err != nil {
			return Result{}, err
		}
		defer func() { err = errors.Join(err, r.disk.close()) }()
		root = filepath.Join(r.disk.dir, "state")
	}
	if r.daemon, err = harness.NewDaemon(cfg.Kilnd, root, daemonConfig(cfg.Power)); err != nil {
		return Result{}, err
	}
	defer func() { err = errors.Join(err, r.daemon.Close()) }()
	if err := r.daemon.Start(); err != nil {
		return Result{}, err
	}
	for n := range cfg.Rounds {
		if err := r.round(ctx, n); err != nil {
			return r.result, fmt.Errorf("round %d: %w", n, err)
		}
		if r.result.Rounds++; r.result.Rounds%20 == 0 {
			fmt.Fprintln(cfg.Log, r.result)
		}
		if len(r.result.Failures) > 20 {
			break
		}
	}
	return r.result, r.end()
}

func (r *run) fail(format string, args ...any) {
	msg := fmt.Sprintf(format, args...)
	fmt.Fprintln(r.Log, "FAILURE:", msg)
	r.result.Failures = append(r.result.Failures, msg)
}

// round builds for a while, takes the daemon down, looks at what it left, and
// starts it again.
func (r *run) round(ctx context.Context, n int) error {
	load := 20*time.Millisecond + time.Duration(r.rnd.Int64N(int64(r.MaxLoad)))
	if n%10 == 9 { // now and then long enough for steps that must be durable
		load += time.Second
	}
	crashed, err := r.load(ctx, load, n)
	if err != nil {
		return err
	}
	// What a kill leaves in files is what was written; a power cut may lose it.
	report, err := r.daemon.Fsck(fmt.Sprintf("--deep=%t", r.Power || n%10 == 0))
	r.result.LastFsck = report
	if err != nil {
		r.fail("round %d: fsck after the crash: %v", n, err)
	}
	damaged := r.Damage && r.rnd.IntN(4) == 0
	if damaged {
		if err := r.damage(); err != nil {
			return err
		}
	}
	if r.rnd.IntN(5) == 0 { // the next one dies while it starts
		if err := r.daemon.StartAndKill(time.Duration(r.rnd.Int64N(int64(100 * time.Millisecond)))); err != nil {
			return err
		}
	}
	began := time.Now()
	if err := r.daemon.Start(); err != nil {
		return err
	}
	took := time.Since(began)
	if damaged {
		r.result.Rebuilds = append(r.result.Rebuilds, took)
	} else {
		r.result.Starts = append(r.result.Starts, took)
	}
	if took > r.MaxStart {
		r.fail("round %d: the daemon took %s to start, from %s on (database damaged before: %t)\n%s", n, took, began.UTC().Format(time.RFC3339Nano), damaged, r.daemon.Log())
	}
	if left, err := r.daemon.Leftovers(); err != nil || left != "" {
		r.fail("round %d: after the start: %s (error %v)", n, left, err)
	}
	if err := r.verify(ctx, crashed, n); err != nil {
		return err
	}
	if err := harness.AddsUp(ctx, r.daemon.Addr, r.daemon.Root); err != nil {
		r.fail("round %d: %v", n, err)
	}
	return ctx.Err()
}

// damage does to the database what no crash does. The journal stands in for it.
func (r *run) damage() error {
	path := filepath.Join(r.daemon.Root, "kiln.db")
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	switch at := r.rnd.IntN(len(data)); r.rnd.IntN(3) {
	case 0:
		return os.Remove(path)
	case 1:
		return os.Truncate(path, int64(at))
	default:
		for range 8 { // spread, so that some hit what counts
			data[r.rnd.IntN(len(data))] ^= 1 << r.rnd.IntN(8)
		}
		return os.WriteFile(path, data, 0o600)
	}
}

// load has clients build until the daemon is taken down, and returns when that
// was.
func (r *run) load(ctx context.Context, how time.Duration, n int) (crashed time.Time, err error) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	for c := range r.Clients {
		rnd := rand.New(rand.NewPCG(r.Seed, uint64(n*r.Clients+c)))
		wg.Go(func() { r.client(ctx, rnd) })
	}
	collected := 0
	if begin := time.Duration(r.rnd.Int64N(int64(2 * how))); begin < how {
		wg.Go(func() { collected = r.collect(ctx, begin) })
	}
	timer := time.NewTimer(how)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
	crashed = time.Now()
	if r.disk != nil {
		err = r.disk.cut()
	}
	err = errors.Join(err, r.daemon.Kill())
	stop()
	wg.Wait()
	r.result.Collected += collected
	if r.disk != nil && err == nil {
		err = r.disk.remount()
	}
	return crashed, err
}

// client builds until the daemon is gone.
func (r *run) client(ctx context.Context, rnd *rand.Rand) {
	for ctx.Err() == nil {
		wrong, err := r.jobs.build(ctx, r.daemon.Addr, r.jobs.pick(rnd), false)
		if wrong != "" {
			r.jobs.complain(wrong)
		}
		if err != nil {
			return
		}
	}
}

// collect has garbage collected after a while, and returns how many records went
// before the daemon did.
func (r *run) collect(ctx context.Context, begin time.Duration) (records int) {
	timer := time.NewTimer(begin)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return 0
	}
	records, err := prune(ctx, r.daemon.Addr)
	// A disk without power fails before its daemon does.
	if err != nil && ctx.Err() == nil && r.disk == nil && status.Code(err) != codes.Unavailable {
		r.jobs.complain(fmt.Sprintf("collect garbage: %v", err))
	}
	return records
}

// verify builds once more what was going on, and some of what was done, and
// compares.
func (r *run) verify(ctx context.Context, crashed time.Time, n int) error {
	r.jobs.crashed(crashed.Add(-r.Bound))
	interrupted, some := r.jobs.touched(r.rnd, 6)
	r.result.InterruptedBuild += len(interrupted)
	for _, j := range append(interrupted, some...) {
		due := j.due()
		wrong, err := r.jobs.build(ctx, r.daemon.Addr, j, true)
		if err != nil {
			return fmt.Errorf("%w\n%s", err, r.daemon.Log())
		}
		if wrong != "" {
			r.fail("round %d: after the crash, %s", n, wrong)
		}
		if r.jobs.mayBeCollected(j) {
			continue
		}
		for _, step := range due {
			if j.ran(step) {
				r.fail("round %d: step %s was told to be done more than %s before the crash, and ran again", n, step, r.Bound)
			} else {
				r.result.Checked++
			}
		}
	}
	for _, c := range r.jobs.complaints() {
		r.fail("round %d: %s", n, c)
	}
	r.result.Builds = r.jobs.finished()
	return nil
}

// end stops the daemon as an init system would and looks at all it leaves.
func (r *run) end() error {
	if err := r.daemon.Stop(); err != nil {
		return err
	}
	report, err := r.daemon.Fsck("--deep")
	r.result.LastFsck = report
	if err != nil {
		r.fail("fsck at the end: %v", err)
	}
	if left, err := r.daemon.Leftovers(); err != nil || left != "" {
		r.fail("at the end: %s (error %v)", left, err)
	}
	return nil
}
