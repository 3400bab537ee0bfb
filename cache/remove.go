package cache

import "errors"

// Remove removes the record named id, retained or not, unless something uses
// it; a missing one is fine. Unlike GetMutable and Discard it waits for
// nothing: the files are not written again, they go when the removal is on
// disk.
func (m *Manager) Remove(id string) error {
	r, _, err := m.seize(id)
	if errors.Is(err, ErrNotFound) || errors.Is(err, ErrLocked) {
		return nil
	}
	if err != nil {
		return err
	}
	return (&Mutable{m: m, r: r}).end(true)
}
