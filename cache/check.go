package cache

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"slices"

	"github.com/kilnbuild/kiln/snapshot"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Report is what Check found.
type Report struct {
	Records, Snapshots, Blobs int
	Bytes                     int64    // of blobs, and of snapshots whose size is known
	Problems                  []string // nothing is wrong if it is empty
}

func (r *Report) problem(format string, args ...any) {
	r.Problems = append(r.Problems, fmt.Sprintf(format, args...))
}

// Check verifies every invariant between records, snapshots, blobs and the
// store. deep also reads all blobs and measures all snapshots again. It wants
// a manager that nothing else uses at the time: what a build is just making
// has no owner yet. The error is about checking, not about what is found.
func (m *Manager) Check(ctx context.Context, deep bool) (*Report, error) {
	if err := m.db.Sync(ctx); err != nil {
		return nil, fmt.Errorf("check cache: %w", err)
	}
	m.flushUses(ctx)
	c := &checker{m: m, report: &Report{}, deep: deep, snaps: map[string]snapshot.Info{}, blobs: map[digest.Digest]snapshot.BlobInfo{}}
	if err := c.list(); err != nil {
		return nil, fmt.Errorf("check cache: %w", err)
	}
	c.records()
	c.owners()
	c.stored()
	if deep {
		if err := c.contents(ctx); err != nil {
			return nil, fmt.Errorf("check cache: %w", err)
		}
	}
	slices.Sort(c.report.Problems)
	return c.report, nil
}

type checker struct {
	m      *Manager
	report *Report
	deep   bool
	snaps  map[string]snapshot.Info
	blobs  map[digest.Digest]snapshot.BlobInfo
}

func (c *checker) list() error {
	err := c.m.snapshots.Walk(func(i snapshot.Info) error {
		c.snaps[i.ID] = i
		return nil
	})
	if err != nil {
		return fmt.Errorf("list snapshots: %w", err)
	}
	err = c.m.blobs.Walk(func(i snapshot.BlobInfo) error {
		c.blobs[i.Digest] = i
		c.report.Bytes += i.Disk
		return nil
	})
	if err != nil {
		return fmt.Errorf("list blobs: %w", err)
	}
	c.report.Snapshots, c.report.Blobs = len(c.snaps), len(c.blobs)
	return nil
}

// records checks each record against what it points at.
func (c *checker) records() {
	m, rep := c.m, c.report
	m.mu.Lock()
	defer m.mu.Unlock()
	rep.Records = len(m.records)
	children := map[*record]int{}
	for id, r := range m.records {
		if r.id != id || r.state == gone {
			rep.problem("record %s is listed as %s and is %s", r.id, id, r.state)
		}
		for _, n := range r.needs() {
			children[n]++
			if m.records[n.id] != n {
				rep.problem("record %s needs %s, which is gone", id, n.id)
			}
			if r.persisted && !n.persisted {
				rep.problem("record %s is stored and %s, which it needs, isn't", id, n.id)
			}
		}
		c.snapshotOf(r)
		c.blobsOf(r)
		chain, blobChain := chains(r)
		if r.chain != "" && r.chain != chain || r.blobChain != "" && r.blobChain != blobChain {
			rep.problem("record %s has the chains %s and %s, its layers give %s and %s", id, r.chain, r.blobChain, chain, blobChain)
		}
	}
	for _, r := range m.records {
		if r.children != children[r] {
			rep.problem("record %s counts %d children and has %d", r.id, r.children, children[r])
		}
		if r.handles == 0 && r.children == 0 && !r.kept() {
			rep.problem("record %s is kept by nothing", r.id)
		}
	}
}

func (c *checker) snapshotOf(r *record) {
	rep := c.report
	if r.snap == "" {
		return
	}
	info, ok := c.snaps[r.snap]
	switch {
	case !ok:
		rep.problem("snapshot %s of record %s is gone", r.snap, r.id)
		return
	case info.Committed != (r.state == immutable):
		rep.problem("snapshot %s of the %s record %s has committed=%t", r.snap, r.state, r.id, info.Committed)
	case r.twin != nil && r.twin.snap != r.snap:
		rep.problem("record %s shares the snapshot %s of %s, which has %s", r.id, r.snap, r.twin.id, r.twin.snap)
	}
	// The owner of a shared snapshot below may be another record of that chain.
	if p := r.parent(); p != nil && r.twin == nil && p.twin == nil && p.snap != "" && info.Parent != p.snap {
		rep.problem("snapshot %s of record %s is on top of %q, not of its parent's %s", r.snap, r.id, info.Parent, p.snap)
	}
	if r.snapSize > 0 && r.twin == nil {
		rep.Bytes += r.snapSize
	}
}

// near says whether two measurements of the same files agree. A file system may
// take another block for a file when it writes it, to find the parts of it by.
func near(a, b int64) bool { return max(a-b, b-a) <= max(a, b)/100+64<<10 }

func (c *checker) blobsOf(r *record) {
	for _, b := range r.blobs {
		info, ok := c.blobs[b.desc.Digest]
		switch {
		case ok != b.stored:
			c.report.problem("record %s says stored=%t of blob %s, which is %t", r.id, b.stored, b.desc.Digest, ok)
		case ok && info.Size != b.desc.Size:
			c.report.problem("blob %s of record %s has %d bytes, not %d", b.desc.Digest, r.id, info.Size, b.desc.Size)
		case ok && !near(info.Disk, b.disk):
			c.report.problem("blob %s of record %s takes %d bytes, not %d", b.desc.Digest, r.id, info.Disk, b.disk)
		}
		if r.diffID == "" {
			c.report.problem("record %s has the blob %s and no diff ID", r.id, b.desc.Digest)
		}
	}
}

// owners checks that everything on disk belongs to a living record.
func (c *checker) owners() {
	m, rep := c.m, c.report
	m.surveying.Lock()
	defer m.surveying.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	owned := map[string]string{}
	all := newEntries(len(m.records))
	use := map[digest.Digest]int{}
	for _, r := range m.records {
		all.addLocked(r)
		for _, d := range all.list[len(all.list)-1].blobs {
			use[d]++
		}
		if r.owns() {
			if other := owned[r.snap]; other != "" {
				rep.problem("snapshot %s belongs to records %s and %s", r.snap, other, r.id)
			}
			owned[r.snap] = r.id
		}
	}
	v := liveness(all.contents())
	for i, e := range all.list {
		if !v.alive[i] {
			rep.problem("record %s is dead and still there", e.usage.ID)
		}
	}
	for id := range c.snaps {
		if owned[id] == "" {
			rep.problem("snapshot %s belongs to no record", id)
		}
	}
	for d := range c.blobs {
		if _, ok := v.owner[d]; !ok {
			rep.problem("blob %s belongs to no record", d)
		}
	}
	for d, n := range m.blobUse {
		if use[d] != n {
			rep.problem("blob %s counts %d users and has %d", d, n, use[d])
		}
	}
	for d, n := range use {
		if m.blobUse[d] == 0 {
			rep.problem("blob %s counts no users and has %d", d, n)
		}
	}
}

// stored checks that the store says what memory says.
func (c *checker) stored() {
	m, rep := c.m, c.report
	seen := map[string]bool{}
	m.db.Scan(bucketRecords, "", func(id string, value []byte) bool {
		seen[id] = true
		m.mu.Lock()
		defer m.mu.Unlock()
		r := m.records[id]
		if r == nil || !r.persisted {
			rep.problem("the store has a record %s that isn't there", id)
			return true
		}
		want, err := encodeLocked(r, r.stored)
		if r.handles == 0 && !r.stored.tells(r) {
			rep.problem("the last use of record %s is stored as %v, not as %v", id, r.stored, useLocked(r))
		}
		if r.handles == 0 && (err != nil || !bytes.Equal(want, value)) {
			rep.problem("record %s is stored as %s, not as %s (error %v)", id, value, want, err)
		}
		return true
	})
	m.mu.Lock()
	for id, r := range m.records {
		if r.persisted && !seen[id] {
			rep.problem("record %s isn't in the store", id)
		}
	}
	m.mu.Unlock()
	m.strayMetadata(func(key string) { rep.problem("metadata %s belongs to no record", key) })
}

// contents reads all blobs and measures all snapshots.
func (c *checker) contents(ctx context.Context) error {
	for d, info := range c.blobs {
		ra, err := c.m.blobs.ReaderAt(ctx, ocispec.Descriptor{Digest: d, Size: info.Size})
		if err != nil {
			c.report.problem("open blob %s: %v", d, err)
			continue
		}
		verifier := d.Verifier()
		_, err = io.Copy(verifier, &interruptible{ctx, io.NewSectionReader(ra, 0, ra.Size())})
		ra.Close()
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		switch {
		case err != nil:
			c.report.problem("read blob %s: %v", d, err)
		case !verifier.Verified():
			c.report.problem("blob %s doesn't match its digest", d)
		}
	}
	entries := c.m.survey()
	for _, e := range entries {
		if e.snap == "" {
			continue
		}
		u, err := c.m.snapshots.Usage(ctx, e.snap)
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil:
			c.report.problem("measure snapshot %s of record %s: %v", e.snap, e.usage.ID, err)
		case e.snapSize != sizeUnknown && !near(e.snapSize, u.Size):
			c.report.problem("snapshot %s of record %s takes %d bytes, not %d", e.snap, e.usage.ID, u.Size, e.snapSize)
		}
	}
	return nil
}

// Remeasure measures all snapshots again and corrects what their records say. It
// returns how many were off by more than a file system's whims.
func (m *Manager) Remeasure(ctx context.Context) (corrected int, err error) {
	for _, e := range m.survey() {
		known := e.snapSize
		if e.snap == "" || known == sizeUnknown {
			continue
		}
		if err := m.measureOne(ctx, e); err != nil {
			return corrected, err
		}
		if !near(known, e.snapSize) {
			corrected++
		}
	}
	m.flushUses(ctx)
	return corrected, nil
}
