package http

import (
	"context"
	"encoding/json"
	stdhttp "net/http"
	"strings"

	"github.com/kilnbuild/kiln/cache"
)

const (
	// placeIndex finds the downloads from a place.
	placeIndex = "http.place"
	// answerKey is where the answer is kept beside the file.
	answerKey = "http.answer"
	// maxKnown bounds how many earlier answers a server is asked about.
	maxKnown = 16
)

// known are earlier downloads from a place, newest first, held.
type known []*earlier

type earlier struct {
	found
	ref *cache.Ref
}

func (i *instance) known(ctx context.Context, place string) (out known) {
	for _, id := range i.opts.Cache.Search(placeIndex, place) {
		if len(out) == maxKnown {
			break
		}
		ref, err := i.opts.Cache.Get(ctx, id)
		if err != nil {
			continue // it was pruned meanwhile, or is lost
		}
		e := &earlier{found{record: id}, ref}
		if raw, ok := ref.Metadata(answerKey); !ok || json.Unmarshal(raw, &e.answer) != nil || e.Digest.Validate() != nil || e.Offered == "" {
			ref.Release() // a crash has left it without, or it is of a daemon that didn't keep all
			continue
		}
		out = append(out, e)
	}
	return out
}

func (k known) release() {
	for _, e := range k {
		e.ref.Release()
	}
}

// askAbout makes a request conditional: on the ETags of all, or, if there are
// none, on the time of the newest.
func (k known) askAbout(h stdhttp.Header) {
	var tags []string
	for _, e := range k {
		if e.ETag != "" {
			tags = append(tags, e.ETag)
		}
	}
	switch {
	case len(tags) > 0:
		h.Set("If-None-Match", strings.Join(tags, ", "))
	case len(k) > 0 && k[0].time() != nil:
		h.Set("If-Modified-Since", k[0].Modified)
	}
}

// meant is the one that an answer is about: the server says that it is
// unchanged, or gives the same ETag though it gives the file, too. It is nil if
// there is none.
func (k known) meant(status int, h stdhttp.Header) *earlier {
	if status != stdhttp.StatusOK && status != stdhttp.StatusNotModified {
		return nil
	}
	tag := etag(h)
	var tagged known
	for _, e := range k {
		if e.ETag == "" {
			continue
		}
		if e.ETag == tag {
			return e
		}
		tagged = append(tagged, e)
	}
	if status != stdhttp.StatusNotModified || tag != "" {
		return nil
	}
	switch {
	case len(tagged) == 1: // what else could be meant
		return tagged[0]
	case len(tagged) == 0 && len(k) > 0:
		return k[0]
	}
	return nil
}

// etag is the ETag without the mark of a weak one.
func etag(h stdhttp.Header) string { return strings.TrimPrefix(h.Get("ETag"), "W/") }
