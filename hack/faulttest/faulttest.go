// Package faulttest runs builds against a real kilnd whose disk fails, or is full:
// its state directory lies on a faultdisk. Each kind of work a daemon does on its
// disk is tried: unpacking a pulled image, running steps, cache mounts, logs,
// transfer of local files, downloads, and exports of images and of cache.
//
// Of each build on a bad disk it wants: that the daemon survives; that the result
// is right, or the error says that it is the disk; that the same build succeeds
// with the right result when the disk is good again, without a restart, unless the
// file system has gone read-only; that fsck finds nothing wrong afterwards, or,
// where the file system lost what it had written, repairs it; and that du adds up.
package faulttest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/kilnbuild/kiln/hack/faultdisk"
	"github.com/kilnbuild/kiln/hack/harness"
	"golang.org/x/sys/unix"
)

// Config says what to run.
type Config struct {
	Kilnd string   // the daemon's binary
	Dir   string   // for disk, sockets and results; empty
	Kinds []string // of work; none are all
	// Every has each request fail once, one round for each. Otherwise the first
	// one is followed by the second, the fourth and so on, and Quick has only two
	// rounds for each kind of work.
	Every, Quick bool
	Log          io.Writer
}

// Result is what came out.
type Result struct {
	Rounds, Failed   int // rounds, and those in which the build failed
	ReadOnly, Mended int // those that ended with a read-only file system, a repair
	Failures         []string
}

// String sums it up.
func (r Result) String() string {
	return fmt.Sprintf("%d rounds; in %d the build failed, in %d the file system went read-only, in %d it had lost what fsck repaired; %d failures",
		r.Rounds, r.Failed, r.ReadOnly, r.Mended, len(r.Failures))
}

// faults are the ways in which the disk fails.
var faults = []faultdisk.Fault{
	{Errno: syscall.EIO, Times: 1},
	{Errno: syscall.EIO},
	{Errno: syscall.ENOSPC, Times: 2},
	{Errno: faultdisk.Torn, Times: 2},
	{Errno: syscall.EIO, Times: 1, Reads: true},
	{Errno: syscall.EIO, Reads: true},
}

type run struct {
	Config
	disk   *faultdisk.Disk
	daemon *harness.Daemon
	work   *work
	result Result
}

// Run does it. The error is about running, not about what is found. The program
// must call faultdisk.Main first thing.
func Run(ctx context.Context, cfg Config) (_ Result, err error) {
	r := &run{Config: cfg}
	if r.disk, err = faultdisk.New(cfg.Dir); err != nil {
		return r.result, err
	}
	defer func() { err = errors.Join(err, r.disk.Close()) }()
	conf := fmt.Sprintf("gc = false\n[registry.%q]\nhttp = true\n", "127.0.0.1")
	if r.daemon, err = harness.NewDaemon(cfg.Kilnd, filepath.Join(r.disk.Dir, "state"), conf); err != nil {
		return r.result, err
	}
	defer func() { err = errors.Join(err, r.daemon.Close()) }()
	if r.work, err = newWork(filepath.Join(cfg.Dir, "work"), r.daemon.Addr); err != nil {
		return r.result, err
	}
	defer func() { err = errors.Join(err, r.work.close()) }()
	for _, k := range kinds {
		if len(cfg.Kinds) > 0 && !slices.Contains(cfg.Kinds, k.name) {
			continue
		}
		if err := r.kind(ctx, k); err != nil {
			return r.result, fmt.Errorf("%s: %w", k.name, err)
		}
	}
	return r.result, nil
}

func (r *run) kind(ctx context.Context, k kind) error {
	for i, f := range faults {
		if r.Quick {
			if i != len(k.name)%len(faults) {
				continue
			}
			f.After = 2 * len(k.name) // differs
		}
		for hit := true; hit; {
			var err error
			if hit, err = r.round(ctx, k, &failing{disk: r.disk, fault: f}); err != nil {
				return err
			}
			if r.Quick {
				break
			}
			f.After++
			if !r.Every {
				f.After = 2*f.After - 1
			}
		}
	}
	for _, room := range []int64{64 << 10, 256 << 10, 1 << 20, 2 << 20, 4 << 20} {
		if r.Quick && room != 256<<10 {
			continue
		}
		hit, err := r.round(ctx, k, &full{disk: r.disk, room: room})
		if err != nil || !hit {
			return err
		}
	}
	return nil
}

func (r *run) fail(format string, args ...any) {
	msg := fmt.Sprintf(format, args...)
	fmt.Fprintln(r.Log, "FAILURE:", msg)
	r.result.Failures = append(r.result.Failures, msg)
}

// trouble is what is wrong with a disk.
type trouble interface {
	fmt.Stringer
	begin() error
	// end makes the disk good again, and says whether a build could have noticed.
	end() (hit bool, err error)
	// cold says that the trouble is only met by who reads what isn't in memory.
	cold() bool
	// known says whether the error is one that names the trouble.
	known(text, root string) bool
}

// round has a disk whose state is new fail during a build.
func (r *run) round(ctx context.Context, k kind, what trouble) (hit bool, err error) {
	if ctx.Err() != nil {
		return false, context.Cause(ctx)
	}
	r.result.Rounds++
	job := r.work.job(k, r.result.Rounds)
	name := fmt.Sprintf("%s, %s", k.name, what)
	if err := os.RemoveAll(r.daemon.Root); err != nil {
		return false, err
	}
	if err := r.daemon.Start(); err != nil {
		return false, err
	}
	if err := job.prepare(ctx); err != nil {
		return false, fmt.Errorf("prepare: %w\n%s", err, r.daemon.Log())
	}
	if what.cold() {
		if err := r.restart(); err != nil {
			return false, err
		}
	}
	if err := what.begin(); err != nil {
		return false, err
	}
	out := job.build(ctx)
	r.flush() // its error is what was asked for
	if hit, err = what.end(); err != nil {
		return hit, err
	}
	fmt.Fprintf(r.Log, "%s: hit %t, error %v\n", name, hit, out.err)
	if out.wrong != "" {
		r.fail("%s: on the bad disk, %s", name, out.wrong)
	}
	if out.err != nil {
		r.result.Failed++
		if text := out.err.Error() + out.log; !what.known(text, r.daemon.Root) {
			r.fail("%s: the error doesn't say that it is the disk: %v", name, out.err)
		}
	}
	if err := r.recover(ctx, job, name); err != nil {
		return hit, err
	}
	return hit || out.err != nil, nil
}

// recover wants all to be well now that the disk is.
func (r *run) recover(ctx context.Context, job *job, name string) error {
	again := job.build(ctx)
	readOnly, err := r.readOnly()
	if err != nil {
		return err
	}
	switch {
	case readOnly:
		r.result.ReadOnly++
		if again.err != nil && !strings.Contains(again.err.Error(), "the disk that holds "+r.daemon.Root+" has failed") {
			r.fail("%s: with a read-only file system, the error doesn't say what to do: %v", name, again.err)
		}
	case again.err != nil:
		r.fail("%s: with the disk good again: %v\n%s", name, again.err, r.daemon.Log())
	}
	if again.wrong != "" {
		r.fail("%s: with the disk good again, %s", name, again.wrong)
	}
	if !readOnly {
		r.addsUp(ctx, name)
	}
	if err := r.daemon.Stop(); err != nil && !readOnly {
		r.fail("%s: %v", name, err)
	}
	if err := errors.Join(r.disk.Unmount(), r.disk.Mount()); err != nil {
		return err
	}
	// Where nothing of the database has reached the disk, there is nothing to look at.
	if report, err := r.daemon.Fsck("--deep"); err != nil && !strings.Contains(err.Error(), "holds no state of kilnd") {
		r.result.Mended++
		fmt.Fprintf(r.Log, "%s: fsck: %v: %s\n", name, err, report)
		if report, err := r.daemon.Fsck("--deep", "--repair"); err != nil {
			r.fail("%s: fsck --repair: %v: %s", name, err, report)
		}
		if report, err := r.daemon.Fsck("--deep"); err != nil {
			r.fail("%s: fsck after the repair: %v: %s", name, err, report)
		}
	}
	if err := r.daemon.Start(); err != nil {
		return err
	}
	if last := job.build(ctx); last.err != nil || last.wrong != "" {
		r.fail("%s: after a restart: %v %s\n%s", name, last.err, last.wrong, r.daemon.Log())
	}
	if err := job.verify(ctx); err != nil {
		r.fail("%s: what was exported: %v", name, err)
	}
	r.addsUp(ctx, name)
	return r.daemon.Stop()
}

// restart has the daemon and the kernel forget what they have in memory.
func (r *run) restart() error {
	if err := r.daemon.Stop(); err != nil {
		return err
	}
	if err := errors.Join(r.disk.Unmount(), r.disk.Mount()); err != nil {
		return err
	}
	return r.daemon.Start()
}

// flush has the kernel write all that there is to write.
func (r *run) flush() {
	if f, err := os.Open(r.disk.Dir); err == nil {
		unix.Syncfs(int(f.Fd()))
		f.Close()
	}
}

// readOnly says whether the file system lets nothing be written any more. (The
// kernel need not show that in its flags.)
func (r *run) readOnly() (bool, error) {
	path := filepath.Join(r.disk.Dir, "try")
	err := os.WriteFile(path, nil, 0o600)
	if err == nil {
		err = os.Remove(path)
	}
	if errors.Is(err, syscall.EROFS) || errors.Is(err, syscall.EIO) {
		return true, nil
	}
	return false, err
}

// addsUp compares what the daemon says its state takes with what it does.
func (r *run) addsUp(ctx context.Context, name string) {
	if err := harness.AddsUp(ctx, r.daemon.Addr, r.daemon.Root); err != nil {
		r.fail("%s: %v", name, err)
	}
}
