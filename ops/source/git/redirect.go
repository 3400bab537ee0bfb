package git

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/kilnbuild/kiln/internal/progress"
)

// remote runs c, which talks to the repository of sp. With credentials git may
// not follow redirects: it would take them along to whatever host. One within
// the same host is followed here.
func (s *Source) remote(ctx context.Context, sp *spec, a *access, c command) ([]byte, error) {
	c.protocols, c.access, c.stall, c.advice = remoteProtocols, a, s.opts.Stall, sp.advice
	c.log = progress.From(ctx).Stream(2)
	out, err := c.run(ctx)
	var failed *runError
	if a.header == "" || a.moved || !errors.As(err, &failed) || !failed.says("returned error: 30") {
		return out, err
	}
	to, err := a.findMoved(ctx, sp)
	if err != nil {
		return nil, err
	}
	a.moved = true
	a.settings = append(a.settings,
		setting{"url." + to + ".insteadOf", sp.url},
		setting{"http." + to + ".extraHeader", "Authorization: " + a.header})
	return c.run(ctx)
}

// maxRedirects bounds how often a repository may have moved.
const maxRedirects = 10

// findMoved is the URL that the repository's leads to.
func (a *access) findMoved(ctx context.Context, sp *spec) (string, error) {
	const file = "/info/refs"
	start := sp.url + file + "?service=git-upload-pack"
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, start, nil)
	if err != nil {
		return "", fmt.Errorf("follow the redirect of %s: %w", sp.url, err)
	}
	req.Header.Set("Authorization", a.header)
	req.Header.Set("User-Agent", "git/2.0 (kiln)") // servers tell git apart by that
	origin := req.URL
	client := &http.Client{CheckRedirect: func(next *http.Request, via []*http.Request) error {
		if next.URL.Host != origin.Host || next.URL.Scheme != origin.Scheme && next.URL.Scheme != "https" {
			return fmt.Errorf("it redirects to another host, %s, which the credentials are not for; give that URL to fetch from there", (&url.URL{Scheme: next.URL.Scheme, Host: next.URL.Host}))
		}
		if len(via) >= maxRedirects {
			return fmt.Errorf("it redirects more than %d times", maxRedirects)
		}
		return nil
	}}
	resp, err := client.Do(req)
	var ue *url.Error
	if errors.As(err, &ue) {
		err = ue.Err // the URL may hold what isn't to be shown
	}
	if err != nil {
		return "", err
	}
	if err := resp.Body.Close(); err != nil {
		return "", fmt.Errorf("follow the redirect of %s: %w", sp.url, err)
	}
	at := *resp.Request.URL
	p, ok := strings.CutSuffix(at.Path, file)
	if !ok {
		return "", fmt.Errorf("%s redirects to %s, which is no repository", sp.url, at.Redacted())
	}
	return (&url.URL{Scheme: at.Scheme, Host: at.Host, Path: p}).String(), nil
}
