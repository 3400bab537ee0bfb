package snapshot

import (
	"fmt"
	"os"
)

// Adopt takes up the active snapshot id on top of parent, which an earlier run
// has left to a process that still writes to it. Its files must be there; it has
// no record. It is called before Sweep, which would remove them.
func (o *Overlay) Adopt(id, parent string) error {
	s := &snap{id: id, record: record{Parent: parent}}
	if err := o.reserve(s); err != nil {
		return err
	}
	st, err := os.Lstat(o.fsPath(id))
	if err == nil && !st.IsDir() {
		err = fmt.Errorf("%s is no directory", o.fsPath(id))
	}
	if err != nil {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.dropLocked(s)
		return fmt.Errorf("adopt snapshot %s: %w", id, err)
	}
	return nil
}

// Leave forgets the active snapshot id, which was never persisted, and lets its
// files be: the next run may Adopt it, or sweeps it.
func (o *Overlay) Leave(id string) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	s, err := o.getLocked(id)
	if err != nil {
		return err
	}
	if s.Committed || s.stored || s.children > 0 {
		return fmt.Errorf("internal error: leave snapshot %q, which isn't an active one without a record", id)
	}
	o.dropLocked(s)
	return nil
}
