package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

// errInUse says that a daemon runs on the same files.
var errInUse = errors.New("it is in use by another daemon, which has to end first")

const (
	fileName = "kiln.db"

	// metaBucket holds what the store itself keeps, under the keys below.
	metaBucket     = ".store"
	formatKey      = "format"       // the layout's version, as text
	formatCheckKey = "format.check" // shows that it is no bit error; see formatCheck
	positionKey    = "position"     // see position
	// unprovenKey is there from when the database was rebuilt until somebody has
	// compared it with the files.
	unprovenKey = "unproven"
	// unprovenWhole is its value when all was rebuilt that there was at some commit,
	// and unprovenPart when records may be missing.
	unprovenWhole, unprovenPart = "\x02", "\x01"

	// format is the layout this program reads and writes. A change of what any
	// package stores, in a way that older programs can't read, raises it and
	// adds a migration.
	format = 4
	// formatWithSum is the first layout with a position.
	formatWithSum = 2

	// lockTimeout is how long Open waits for a daemon that is about to exit.
	lockTimeout = time.Second
	lockPoll    = 10 * time.Millisecond
)

// migrations bring a database from the layout that is their index to the next.
var migrations = [format]func(tx *bbolt.Tx, found finding) (position, error){
	// 0 is a file that was made and never written.
	0: func(*bbolt.Tx, finding) (position, error) { return position{}, nil },
	// 1 had no position: its records can't be proven, and count as right.
	1: func(_ *bbolt.Tx, found finding) (position, error) { return position{1, found.found}, nil },
	// 2 had a bucket for each kind of entry of the key graph.
	2: joinKeys,
	// 3 had names of images, which nobody could use or remove.
	3: dropImages,
}

// Open opens or creates the database.
//
// It looks at every page first. A damaged file is set aside as
// kiln.db.damaged-<time>, of which the newest is kept for a time, and the
// database is rebuilt from the journal; so it is when the file is gone. Warn is
// told what happened and what is lost. An older layout is migrated; one newer
// than this program understands is an error that says so.
func Open(opts Options) (*DB, error) {
	if opts.Delay == 0 {
		opts.Delay = DefaultDelay
	}
	if opts.Warn == nil {
		opts.Warn = func(string, ...any) {}
	}
	root := opts.Locked
	if root == nil {
		var err error
		if root, err = Lock(opts.Root); err != nil {
			return nil, err
		}
	}
	d := &DB{
		path:     filepath.Join(opts.Root, fileName),
		root:     root,
		delay:    opts.Delay,
		warn:     opts.Warn,
		readOnly: opts.ReadOnly,
		journal:  &journal{path: filepath.Join(opts.Root, journalName), warn: opts.Warn},
		wake:     make(chan struct{}, 1),
		hurry:    make(chan struct{}, 1),
		closing:  make(chan struct{}),
		stopped:  make(chan struct{}),
		current:  newGroup(),
		synced:   time.Now(),
	}
	d.persist, d.sync = d.write, d.syncfs
	if err := d.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("open %s: %w", d.path, err), root.Close())
	}
	if d.readOnly {
		close(d.stopped)
		return d, nil
	}
	d.dropAsides(time.Now())
	complete, err := d.fillReserve()
	d.spent = !complete || err != nil // a daemon starts on a full disk, too
	d.committing.Lock()               // until run has seen to the journal
	go d.run()
	return d, nil
}

// open sees to it that there is a sound database, and opens it.
func (d *DB) open() error {
	found, err := inspect(d.path)
	if err != nil && !d.readOnly {
		found, err = d.mend(err)
	}
	if errors.Is(err, os.ErrNotExist) {
		err = damagedf("it is missing")
	}
	if err != nil {
		return err
	}
	d.unproven.Store(found.unproven)
	d.partial = found.partial
	if d.readOnly && found.format > 0 && found.format < format {
		return fmt.Errorf("it has layout %d, not yet %d: the next start of the daemon migrates it", found.format, format)
	}
	if d.bolt, err = openBolt(d.path, d.readOnly); err != nil || d.readOnly {
		return err
	}
	at, err := d.migrate(found)
	if err == nil {
		err = d.journal.attach(at, found.bytes)
	}
	if err != nil {
		return errors.Join(err, d.bolt.Close())
	}
	return nil
}

// Lock takes the state directory root for this process, for as long as the
// directory that it returns is open. It is an error if another daemon has it, and
// doesn't end in a short time.
func Lock(root string) (*os.File, error) {
	dir, err := os.Open(root)
	if err != nil {
		return nil, fmt.Errorf("open the state directory: %w", err)
	}
	if err := lock(dir); err != nil {
		return nil, errors.Join(fmt.Errorf("open %s: %w", filepath.Join(root, fileName), err), dir.Close())
	}
	return dir, nil
}

// lock is for Lock; bbolt's own lock comes too late, after the file was looked at.
func lock(dir *os.File) error {
	deadline := time.After(lockTimeout)
	tick := time.NewTicker(lockPoll)
	defer tick.Stop()
	for {
		err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case err != unix.EWOULDBLOCK && err != unix.EINTR:
			return fmt.Errorf("lock %s: %w", dir.Name(), err)
		}
		select {
		case <-tick.C:
		case <-deadline:
			return errInUse
		}
	}
}

// mend makes another database in place of one that is missing or damaged, and
// looks at that.
func (d *DB) mend(why error) (finding, error) {
	var err error
	switch {
	case errors.Is(why, os.ErrNotExist):
		err = d.replace()
	case errors.Is(why, errDamaged):
		err = d.setAside(why)
	default:
		err = why
	}
	if err != nil {
		return finding{}, err
	}
	return inspect(d.path)
}

// replace makes a database where there is none.
func (d *DB) replace() error {
	_, noJournal := os.Lstat(d.journal.path)
	_, noReserve := os.Lstat(d.reservePath())
	if noJournal != nil && noReserve != nil {
		return d.create(nil) // there never was one
	}
	return d.rebuild("the database is missing")
}

func openBolt(path string, readOnly bool) (*bbolt.DB, error) {
	var bolt *bbolt.DB
	err := guard(func() (err error) {
		bolt, err = bbolt.Open(path, 0o600, &bbolt.Options{
			Timeout: lockTimeout,
			// The list of free pages is written with every commit, which costs
			// little as long as the file isn't mostly free, and spares reading
			// the whole file at start. As a map it stays quick when it isn't.
			FreelistType: bbolt.FreelistMapType,
			NoStatistics: true,
			ReadOnly:     readOnly,
		})
		return err
	})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, errInUse
	}
	return bolt, err
}

// migrate brings an older layout up to date, in one transaction.
func (d *DB) migrate(found finding) (position, error) {
	if found.format == format {
		return found.position, nil
	}
	at := found.position
	err := d.bolt.Update(func(tx *bbolt.Tx) (err error) {
		for v := found.format; v < format; v++ {
			if at, err = migrations[v](tx, found); err != nil {
				return fmt.Errorf("migrate layout %d: %w", v, err)
			}
			found.position = at
		}
		return putLayout(tx, format, at)
	})
	if err == nil && found.format > 0 {
		d.warn("the database was migrated", "path", d.path, "from", found.format, "to", format)
	}
	return at, err
}

// IsDamaged says whether Open of a read-only database failed because it is damaged
// or missing.
func IsDamaged(err error) bool { return errors.Is(err, errDamaged) }

// Unproven says whether the database was rebuilt from the journal and may be
// behind the files: what could have been written to since isn't to be trusted.
// A batch with Proven ends that.
func (d *DB) Unproven() bool { return d.unproven.Load() }

// Partial says whether an unproven database may lack some of the records that
// there were at the commit it stands at, so that others may point at what isn't
// there. Without that it is as whole as any commit left it.
func (d *DB) Partial() bool { return d.partial && d.Unproven() }

// ReadOnly says whether nothing on disk may be changed.
func (d *DB) ReadOnly() bool { return d.readOnly }
