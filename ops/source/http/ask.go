package http

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	stdhttp "net/http"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/moby/buildkit/session"
	"github.com/opencontainers/go-digest"
)

// ask sends the one request, and downloads the file unless it is known.
func (i *instance) ask(ctx context.Context, g session.Group, place string, known known) (_ *cache.Ref, _ *found, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watch := time.AfterFunc(i.opts.Stall, func() {
		cancel(fmt.Errorf("fetch %s: the server sent nothing for %s", i.spec.shown, i.opts.Stall))
	})
	defer watch.Stop()
	defer func() {
		if err != nil && ctx.Err() != nil {
			err = context.Cause(ctx)
		}
	}()
	req, err := i.request(ctx, g)
	if err != nil {
		return nil, nil, err
	}
	known.askAbout(req.Header)
	resp, err := i.client(g).Do(req)
	if err != nil {
		return nil, nil, fmt.Errorf("fetch %s: %w", i.spec.shown, withoutURL(err))
	}
	defer resp.Body.Close() // what was read of it is verified by what follows
	if e := known.meant(resp.StatusCode, resp.Header); e != nil {
		return e.ref.Clone(), &e.found, nil
	}
	if resp.StatusCode < 200 || resp.StatusCode >= 400 || resp.StatusCode == stdhttp.StatusNotModified {
		return nil, nil, fmt.Errorf("fetch %s: invalid response status %s%s", i.spec.shown, resp.Status, i.advice(resp.StatusCode))
	}
	if resp.ContentLength > i.opts.MaxSize {
		return nil, nil, fmt.Errorf("fetch %s: it has %d bytes, more than the %d that are downloaded", i.spec.shown, resp.ContentLength, i.opts.MaxSize)
	}
	body := &watched{r: resp.Body, heard: func() { watch.Reset(i.opts.Stall) }, left: i.opts.MaxSize, max: i.opts.MaxSize}
	defer progress.From(ctx).Begin("download " + i.spec.shown)()
	return i.save(ctx, place, i.spec.answer(resp.Header), body)
}

// advice is what to do about a status, where that is known.
func (i *instance) advice(status int) string {
	if status == stdhttp.StatusUnauthorized || status == stdhttp.StatusForbidden {
		return fmt.Sprintf("; give a token with --secret id=%s%s", tokenSecret, i.spec.url.Hostname())
	}
	return ""
}

// watched is a body that must not be silent or endless.
type watched struct {
	r     io.Reader
	heard func()
	left  int64
	max   int64
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.r.Read(p)
	w.heard()
	if w.left -= int64(n); w.left < 0 {
		return n, fmt.Errorf("it has more than the %d bytes that are downloaded", w.max)
	}
	return n, err
}

// save writes the file that a is about to a record. Its digest must be a's, if a
// has one.
func (i *instance) save(ctx context.Context, place string, a answer, body io.Reader) (_ *cache.Ref, _ *found, err error) {
	u, err := i.opts.Cache.New(ctx, nil, cache.Options{
		Description: "http url " + i.spec.shown, Index: map[string]string{placeIndex: place}, Retain: true,
	})
	if err != nil {
		return nil, nil, fmt.Errorf("make record for %s: %w", i.spec.shown, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Discard(context.WithoutCancel(ctx)))
		}
	}()
	mtime := time.Unix(0, 0)
	if t := a.time(); t != nil {
		mtime = *t
	}
	want, algorithm := a.Digest, digest.SHA256
	if want != "" {
		algorithm = want.Algorithm()
	}
	sum := algorithm.Digester()
	err = i.spec.file.Write(ctx, u, a.Name, mtime, func(w io.Writer) error {
		_, err := io.Copy(io.MultiWriter(w, sum.Hash()), body)
		return err
	})
	if err != nil {
		return nil, nil, fmt.Errorf("fetch %s: %w", i.spec.shown, withoutURL(err))
	}
	a.Digest = sum.Digest()
	if want != "" && a.Digest != want {
		return nil, nil, fmt.Errorf("digest mismatch for %s: %s (expected: %s)", i.spec.shown, a.Digest, want)
	}
	raw, err := json.Marshal(a)
	if err != nil {
		return nil, nil, fmt.Errorf("encode what was said of %s: %w", i.spec.shown, err)
	}
	u.SetMetadata(answerKey, raw)
	ref, err := u.Commit(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("commit %s: %w", i.spec.shown, err)
	}
	return ref, &found{answer: a, record: ref.ID()}, nil
}
