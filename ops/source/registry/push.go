package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	remoteserrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Push uploads desc to ref, unless the registry has it already or can mount it
// from another repository that desc's annotations name (SourceAnnotations).
// open gives the bytes, and is called again when a broken upload is repeated.
// A manifest is put under ref's tag if it has one.
func (r *Resolver) Push(ctx context.Context, ref string, desc ocispec.Descriptor, open func(context.Context) (io.ReadCloser, error)) (existed bool, err error) {
	delay := r.c.delay
	for n := 1; ; n++ {
		existed, err = r.pushOnce(ctx, ref, desc, open)
		if err == nil || n == attemptsLast || ctx.Err() != nil || !worthRepeating(err) {
			return existed, err
		}
		t := time.NewTimer(delay)
		delay *= 2
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return false, context.Cause(ctx)
		}
	}
}

func (r *Resolver) pushOnce(ctx context.Context, ref string, desc ocispec.Descriptor, open func(context.Context) (io.ReadCloser, error)) (existed bool, err error) {
	p, err := r.Pusher(ctx, ref)
	if err != nil {
		return false, err
	}
	w, err := p.Push(ctx, desc)
	if errdefs.IsAlreadyExists(err) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, w.Close()) }()

	rc, err := open(ctx)
	if err != nil {
		return false, fmt.Errorf("open %s to push it: %w", desc.Digest, err)
	}
	defer func() { err = errors.Join(err, rc.Close()) }()

	err = content.Copy(ctx, w, rc, desc.Size, desc.Digest)
	if errdefs.IsAlreadyExists(err) {
		return true, nil
	}
	return false, r.explain(ctx, fmt.Sprintf("push %s to", desc.Digest), ref, err)
}

// worthRepeating tells whether an upload may go well another time. Failures
// before the first byte of the body were repeated by the transport.
func worthRepeating(err error) bool {
	var exhausted *transportError
	if errors.As(err, &exhausted) {
		return exhausted.attempts == 1 && transientError(exhausted.err)
	}
	var status remoteserrors.ErrUnexpectedStatus
	if errors.As(err, &status) {
		return transient(&http.Response{StatusCode: status.StatusCode}, nil)
	}
	return transientError(err)
}

// SourceAnnotations returns annotations with the note that a blob is known to
// be in ref's repository, so that a push to the same registry can mount it.
func SourceAnnotations(annotations map[string]string, ref Reference) map[string]string {
	host := ref.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h // containerd's pusher looks for it without the port
	}
	key := labels.LabelDistributionSource + "." + host
	if annotations[key] == ref.Repository {
		return annotations
	}
	out := maps.Clone(annotations)
	if out == nil {
		out = map[string]string{}
	}
	if have := out[key]; have != "" {
		out[key] = have + "," + ref.Repository
	} else {
		out[key] = ref.Repository
	}
	return out
}
