package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/docker/go-units"
	"github.com/kilnbuild/kiln/internal/progress"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ensureBlob makes sure that a blob of r is in the store. If it has to be
// fetched by this call, sink, unless nil, gets the bytes as they arrive. The
// blob is stored only if its digest and size are right.
func (m *Manager) ensureBlob(ctx context.Context, r *record, desc ocispec.Descriptor, sink func(context.Context, io.Reader) error) error {
	if m.stored(r, desc.Digest) {
		return nil
	}
	err := m.fetching.do(ctx, desc.Digest, func(ctx context.Context) error {
		if m.stored(r, desc.Digest) {
			return nil
		}
		return m.fetch(ctx, r, desc, sink)
	})
	if err == nil {
		m.stored(r, desc.Digest) // another record may have fetched it
	}
	return err
}

// fetch asks the sources of r for the blob, newest first, and then who offers it.
func (m *Manager) fetch(ctx context.Context, r *record, desc ocispec.Descriptor, sink func(context.Context, io.Reader) error) error {
	m.mu.Lock()
	sources := append(slices.Clone(r.sources), m.offers[desc.Digest]...)
	m.mu.Unlock()
	var problems []error
	for i, src := range sources {
		if slices.Contains(sources[:i], src) {
			continue // a build's import is a source of its records, and offers the same
		}
		err := m.fetchFrom(ctx, r, desc, src, sink)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		switch {
		case errors.Is(err, ErrLost), localTrouble(err) && !errors.Is(err, errSource):
			return err
		case errors.Is(err, errContent): // the right bytes; no other source has better
			return m.lostContent(r, desc, err)
		}
		if told, ok := src.(failureTold); ok {
			err = told.Failed(desc, err)
		}
		problems = append(problems, err)
	}
	if len(problems) == 0 {
		problems = append(problems, errors.New("it isn't stored, and no build has said where to get it"))
	}
	err := fmt.Errorf("%w: fetch layer %s: %w", ErrLost, desc.Digest, errors.Join(problems...))
	if m.snapOf(r) != "" {
		return err // only this form of it: the files are there
	}
	return m.lose(r, err)
}

// failureTold is a BlobSource that is told when a blob couldn't be had from it,
// and says so in its own words.
type failureTold interface {
	Failed(desc ocispec.Descriptor, err error) error
}

// errSource marks errors of a BlobSource.
var errSource = errors.New("source")

func (m *Manager) fetchFrom(ctx context.Context, r *record, desc ocispec.Descriptor, src BlobSource, sink func(context.Context, io.Reader) error) error {
	body, cancel := context.WithCancel(ctx) // ends the transfer alone
	defer cancel()
	rc, err := src.Open(body, desc)
	if err != nil {
		return sourceError{err}
	}
	stop := context.AfterFunc(body, func() { rc.Close() })
	defer func() {
		if stop() {
			rc.Close()
		}
	}()
	w, err := m.blobs.Create()
	if err != nil {
		return fmt.Errorf("store blob %s: %w", desc.Digest, err)
	}
	defer w.Close()

	in := &incoming{src: &lively{src: rc, bound: m.stall, stop: cancel}, out: w, desc: desc, report: reportTo(ctx, desc)}
	var sinkErr error
	if sink != nil {
		sinkErr = sink(ctx, in)
	}
	// The sink may stop early; the blob is all of it. After a failure the
	// digest tells whether the bytes were wrong.
	io.Copy(io.Discard, in) // errors stay in in.err
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case isFull(in.err):
		return fmt.Errorf("store blob %s of %s: %w", desc.Digest, units.BytesSize(float64(desc.Size)), in.err)
	case in.err != nil:
		return in.err
	case in.read < desc.Size:
		return sourceError{fmt.Errorf("blob %s ends after %d of %d bytes", desc.Digest, in.read, desc.Size)}
	case sinkErr != nil && localTrouble(sinkErr):
		return sinkErr
	}
	if err := m.storeBlob(r, w, desc, r.diffID); err != nil {
		return err
	}
	if sinkErr == nil {
		in.report.done()
	}
	return sinkErr
}

// sourceError is an error of a BlobSource, in its own words.
type sourceError struct{ error }

func (e sourceError) Unwrap() error        { return e.error }
func (e sourceError) Is(target error) bool { return target == errSource }

// incoming reads a blob from a source into an ingest, and passes on what it
// read. It stops a source that sends more than the descriptor promises.
type incoming struct {
	src    io.Reader
	out    io.Writer
	desc   ocispec.Descriptor
	report *reporter
	read   int64
	err    error // the first, other than the end
}

func (in *incoming) Read(p []byte) (int, error) {
	if in.err != nil {
		return 0, in.err
	}
	n, err := in.src.Read(p)
	in.read += int64(n)
	if err != nil && err != io.EOF {
		in.err = sourceError{err}
		return 0, in.err
	}
	if in.desc.Size > 0 && in.read > in.desc.Size {
		in.err = sourceError{fmt.Errorf("blob %s is longer than its %d bytes", in.desc.Digest, in.desc.Size)}
		return 0, in.err
	}
	if _, werr := in.out.Write(p[:n]); werr != nil {
		in.err = fmt.Errorf("store blob %s: %w", in.desc.Digest, werr)
		return 0, in.err
	}
	in.report.progress(in.read)
	return n, err
}

// reportEvery bounds how often the progress of a transfer is told.
const reportEvery = 100 * time.Millisecond

// reporter tells the progress of one transfer, as a status that is named by
// the blob's digest.
type reporter struct {
	scope  progress.Scope
	status progress.Status
}

func reportTo(ctx context.Context, desc ocispec.Descriptor) *reporter {
	start := time.Now()
	r := &reporter{scope: progress.From(ctx), status: progress.Status{
		ID: desc.Digest.String(), Total: desc.Size, Started: &start,
	}}
	r.write(start)
	return r
}

func (r *reporter) progress(n int64) {
	r.status.Current = n
	if now := time.Now(); now.Sub(r.status.Timestamp) >= reportEvery {
		r.write(now)
	}
}

func (r *reporter) done() {
	now := time.Now()
	r.status.Completed = &now
	r.write(now)
}

func (r *reporter) write(now time.Time) {
	r.status.Timestamp = now
	s := r.status
	r.scope.Write(progress.Event{Status: &s})
}
