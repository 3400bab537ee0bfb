package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

const (
	fileName = "kiln.db"
	// suspectName stands beside the database when reading it failed. The next
	// start then examines every page, which takes too long to do it always.
	suspectName = "kiln.db.suspect"

	// metaBucket holds what the store itself keeps.
	metaBucket = ".store"
	formatKey  = "format"
	// format is the layout this program reads and writes. A change of what any
	// package stores, in a way that older programs can't read, raises it.
	format = 1

	// lockTimeout is how long Open waits for a daemon that is about to exit.
	lockTimeout = time.Second
)

// errDamaged marks a file that is to be set aside.
var errDamaged = errors.New("the file is damaged")

// Open opens or creates the database. A file that bbolt can't open or whose
// layout is damaged is set aside as kiln.db.damaged-<time>, reported through
// Warn, and an empty one takes its place. A layout newer than this program
// understands is an error that says so.
func Open(opts Options) (*DB, error) {
	if opts.Delay == 0 {
		opts.Delay = DefaultDelay
	}
	if opts.Warn == nil {
		opts.Warn = func(string, ...any) {}
	}
	root, err := os.Open(opts.Root)
	if err != nil {
		return nil, fmt.Errorf("open the state directory: %w", err)
	}
	d := &DB{
		path:    filepath.Join(opts.Root, fileName),
		root:    root,
		delay:   opts.Delay,
		warn:    opts.Warn,
		wake:    make(chan struct{}, 1),
		hurry:   make(chan struct{}, 1),
		closing: make(chan struct{}),
		stopped: make(chan struct{}),
		current: newGroup(),
	}
	d.persist = d.write
	if d.bolt, err = d.openBolt(); err != nil {
		return nil, errors.Join(err, root.Close())
	}
	d.spent = d.fillReserve() != nil // a daemon starts on a full disk, too
	go d.run()
	return d, nil
}

// openBolt opens the file, or a new one in place of a damaged one.
func (d *DB) openBolt() (*bbolt.DB, error) {
	suspect := filepath.Join(d.root.Name(), suspectName)
	_, err := os.Lstat(suspect)
	bolt, err := open(d.path, err == nil)
	if errors.Is(err, errDamaged) {
		aside := d.path + ".damaged-" + time.Now().UTC().Format("20060102T150405.000000")
		if rerr := os.Rename(d.path, aside); rerr != nil {
			return nil, fmt.Errorf("set the database aside: %w (because: %w)", rerr, err)
		}
		d.warn("the database was damaged; it is set aside and an empty one takes its place", "error", err, "aside", aside)
		bolt, err = open(d.path, false)
	}
	if err != nil {
		return nil, err
	}
	if err := os.Remove(suspect); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, errors.Join(err, bolt.Close())
	}
	return bolt, nil
}

// open opens the file and looks at its layout; if thorough, at every page.
func open(path string, thorough bool) (*bbolt.DB, error) {
	bolt, err := openFile(path)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	err = guard(func() error { return examine(bolt, thorough) })
	if err == nil {
		return bolt, nil
	}
	if p := (*panicError)(nil); errors.As(err, &p) {
		err = fmt.Errorf("%w: %w", errDamaged, err)
	}
	return nil, fmt.Errorf("open %s: %w", path, errors.Join(err, bolt.Close()))
}

func openFile(path string) (bolt *bbolt.DB, err error) {
	var file *os.File
	err = guard(func() error {
		bolt, err = bbolt.Open(path, 0o600, &bbolt.Options{
			Timeout: lockTimeout,
			// The list of free pages is written with every commit, which costs
			// little as long as the file isn't mostly free, and spares reading
			// the whole file at start. As a map it stays quick when it isn't.
			FreelistType: bbolt.FreelistMapType,
			NoStatistics: true,
			OpenFile: func(name string, flag int, mode os.FileMode) (*os.File, error) {
				file, err = os.OpenFile(name, flag, mode)
				return file, err
			},
		})
		return err
	})
	switch p := (*panicError)(nil); {
	case err == nil:
		return bolt, nil
	case errors.Is(err, bolterrors.ErrTimeout):
		return nil, errors.New("it is in use by another daemon")
	case errors.As(err, &p):
		// bbolt leaves the file open, and locked. The lock was ours, so that
		// the file is nobody else's.
		return nil, errors.Join(fmt.Errorf("%w: %w", errDamaged, err), file.Close())
	case errors.Is(err, bolterrors.ErrInvalid), errors.Is(err, bolterrors.ErrVersionMismatch),
		errors.Is(err, bolterrors.ErrChecksum), errors.Is(err, bolterrors.ErrInvalidMapping), tooSmall(path):
		return nil, fmt.Errorf("%w: %w", errDamaged, err)
	}
	return nil, err
}

// tooSmall says whether the file doesn't even hold bbolt's two meta pages.
func tooSmall(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Size() > 0 && st.Size() < 2*int64(os.Getpagesize())
}

// examine looks whether the file is whole, as far as that is quick to see, and
// of the right layout. An empty one gets the layout's version.
func examine(bolt *bbolt.DB, thorough bool) error {
	fresh := false
	err := bolt.View(func(tx *bbolt.Tx) error {
		st, err := os.Stat(bolt.Path())
		if err != nil {
			return err
		}
		if st.Size() < tx.Size() {
			return fmt.Errorf("%w: it has %d bytes and should have at least %d", errDamaged, st.Size(), tx.Size())
		}
		if k, _ := tx.Cursor().First(); k == nil {
			fresh = true
			return nil
		}
		return checkFormat(tx)
	})
	if err == nil && thorough && !fresh {
		if err = check(bolt); err != nil {
			err = fmt.Errorf("%w: %w", errDamaged, err)
		}
	}
	if err != nil || !fresh {
		return err
	}
	return bolt.Update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists([]byte(metaBucket))
		if err != nil {
			return err
		}
		return b.Put([]byte(formatKey), []byte(strconv.Itoa(format)))
	})
}

func checkFormat(tx *bbolt.Tx) error {
	b := tx.Bucket([]byte(metaBucket))
	if b == nil {
		return fmt.Errorf("%w: the layout's version is missing", errDamaged)
	}
	text := string(b.Get([]byte(formatKey)))
	n, err := strconv.Atoi(text)
	switch {
	case err != nil || n < 1:
		return fmt.Errorf("%w: the layout's version is %q", errDamaged, text)
	case n > format:
		return fmt.Errorf("it has layout %d, and this program knows layouts up to %d only: a newer kiln wrote it; use that, or another root", n, format)
	}
	return nil
}

// markSuspect has the next start examine the whole file.
func (d *DB) markSuspect(cause error) {
	d.suspect.Do(func() {
		d.warn("the database can't be read; restart the daemon to have it examined and, if damaged, set aside", "path", d.path, "error", cause)
		f, err := os.Create(filepath.Join(d.root.Name(), suspectName))
		if err == nil {
			err = f.Close()
		}
		if err != nil {
			d.warn("the next start won't examine the database", "error", err)
		}
	})
}
