package cache

import (
	"errors"
	"fmt"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A lazy layer whose build has ended is fetched from whoever offers it, while it
// is offered, and from nobody else.
func TestOffer(t *testing.T) {
	e := newEnv(t)
	src, none, offered := newSource(), newSource(), newSource()
	layers := []Layer{src.add(t, "gzip", tarOf(t, "a=1")), src.add(t, "gzip", tarOf(t, "b=2"))}
	r := e.pull(src, layers...)
	e.persist(r)
	id := r.ID()
	r.Release()
	for range layers { // the same bytes, but counted apart
		offered.add(t, "gzip", tarOf(t, "a=1"))
		offered.add(t, "gzip", tarOf(t, "b=2"))
	}
	digests := []digest.Digest{layers[1].Blob.Digest, layers[0].Blob.Digest, layers[0].Blob.Digest}
	gone := e.m.Offer(digests, none) // which has nothing
	release := e.m.Offer(digests, offered)
	r = get(e.m.Get(t.Context(), id))(t)
	must(t, r.Extract(t.Context()))
	e.wantFiles(r, "a=1", "b=2")
	if src.count() != 0 || offered.count() != 2 {
		t.Errorf("%d blobs from the build that has ended, %d from the offer", src.count(), offered.count())
	}
	r.Release()
	gone()
	release()
	release() // does nothing
	if len(e.m.offers) != 0 {
		t.Errorf("still on offer: %v", e.m.offers)
	}

	l := src.add(t, "gzip", tarOf(t, "c=3"))
	defer e.m.Offer([]digest.Digest{l.Blob.Digest}, none)()
	r = get(e.m.GetByBlob(t.Context(), l, nil, nil, Options{}))(t)
	if err := r.Extract(t.Context()); !errors.Is(err, ErrLost) {
		t.Errorf("extracted what nobody has: %v", err)
	}
	r.Release()
}

// told is a source that has nothing, and says so in its own words.
type told struct{ *memSource }

func (told) Failed(desc ocispec.Descriptor, err error) error {
	return fmt.Errorf("the source of %s: %w", desc.Digest, err)
}

// A source of a record that offers its layers too is asked once, and tells what
// became of it.
func TestSourceIsAskedOnce(t *testing.T) {
	e := newEnv(t)
	there, none := newSource(), told{newSource()}
	l := there.add(t, "gzip", tarOf(t, "a=1"))
	defer e.m.Offer([]digest.Digest{l.Blob.Digest}, none)()
	r := get(e.m.GetByBlob(t.Context(), l, nil, none, Options{}))(t)
	wantErr(t, r.Extract(t.Context()), ErrLost, "the source of "+l.Blob.Digest.String())
	if none.count() != 1 {
		t.Errorf("it was asked %d times", none.count())
	}
	r.Release()
}
