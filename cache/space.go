package cache

import (
	"context"
	"fmt"

	"github.com/kilnbuild/kiln/snapshot"
)

// Space says where the bytes below the root are, in allocated blocks: each is
// in exactly one of the fields.
type Space struct {
	Records  int64 // what DiskUsage lists
	Writing  int64 // mutable records in use, whose usage is 0, and blobs that aren't complete
	Removed  int64 // of removed records, about to be deleted
	Database int64
	Reserve  int64 // kept free, for the database on a full disk
	Logs     int64 // of steps, kept with the history
	Other    int64 // directories, the worker's id, what belongs to running steps
}

// Total is all.
func (s Space) Total() int64 {
	return s.Records + s.Writing + s.Removed + s.Database + s.Reserve + s.Logs + s.Other
}

// measured is a store that takes more than what it lists.
type measured interface {
	Extra(ctx context.Context) (snapshot.Extra, error)
}

// Space measures all that is below the root, where logs is the directory of steps'
// logs, "" if there is none. While builds run it is true for no one moment, but no
// byte is left out.
func (m *Manager) Space(ctx context.Context, logs string) (Space, error) {
	s, err := m.space(ctx, logs)
	if err != nil {
		return Space{}, fmt.Errorf("measure %s: %w", m.root, err)
	}
	return s, nil
}

func (m *Manager) space(ctx context.Context, logs string) (s Space, err error) {
	entries := m.survey()
	if err := m.measure(ctx, entries); err != nil {
		return s, err
	}
	for _, e := range entries {
		s.Records += e.usage.Size
	}
	if s.Writing, err = m.writing(ctx); err != nil {
		return s, err
	}
	database, reserve, known, err := m.db.Size()
	if err != nil {
		return s, err
	}
	s.Database, s.Reserve = database, reserve
	for _, part := range []any{m.snapshots, m.blobs} {
		p, ok := part.(measured)
		if !ok {
			continue
		}
		x, err := p.Extra(ctx)
		if err != nil {
			return s, err
		}
		s.Writing += x.Writing
		s.Removed += x.Removed
		s.Other += x.Fixed
		known = append(known, x.Dirs...)
	}
	if logs != "" {
		if s.Logs, err = snapshot.Elsewhere(ctx, logs, nil); err != nil && !isGone(err) {
			return s, err
		}
		known = append(known, logs)
	}
	other, err := snapshot.Elsewhere(ctx, m.root, known)
	s.Other += other
	return s, err
}

// writing measures the snapshots of mutable records in use.
func (m *Manager) writing(ctx context.Context) (total int64, err error) {
	var snaps []string
	m.eachRecord(func(r *record) {
		if r.state == mutable && r.handles > 0 && r.owns() {
			snaps = append(snaps, r.snap)
		}
	})
	for _, snap := range snaps {
		u, err := m.snapshots.Usage(ctx, snap)
		if err != nil && !isGone(err) {
			return 0, err
		}
		total += u.Size
	}
	return total, nil
}
