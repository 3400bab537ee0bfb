package registrytest

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
)

// allowedLocked checks the authorization of req and answers it if it is
// lacking.
func (r *Registry) allowedLocked(w http.ResponseWriter, req *http.Request, repo string) bool {
	if r.Users == nil {
		return true
	}
	action := "pull"
	if req.Method != http.MethodGet && req.Method != http.MethodHead {
		action = "push"
	}
	if r.Basic {
		user, password, _ := req.BasicAuth()
		if want, ok := r.Users[user]; ok && user != "" && want == password {
			return true
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		fail(w, http.StatusUnauthorized, "UNAUTHORIZED", "authentication required")
		return false
	}
	want := "repository:" + repo + ":" + action
	bearer := strings.TrimPrefix(req.Header.Get("Authorization"), "Bearer ")
	g, known := r.tokens[bearer]
	if known && !r.Expired[bearer] && slices.Contains(g.scopes, want) {
		return true
	}
	scope := "repository:" + repo + ":pull"
	if action == "push" {
		scope += ",push"
	}
	challenge := fmt.Sprintf(`Bearer realm="%s/token",service="test",scope="%s"`, r.Server.URL, scope)
	switch {
	case known && !r.Expired[bearer]:
		challenge += `,error="insufficient_scope"`
	case bearer != "":
		challenge += `,error="invalid_token"`
	}
	w.Header().Set("WWW-Authenticate", challenge)
	fail(w, http.StatusUnauthorized, "UNAUTHORIZED", "authentication required")
	return false
}

// tokenLocked is the token server.
func (r *Registry) tokenLocked(w http.ResponseWriter, req *http.Request, body []byte) {
	user, password, named := req.BasicAuth()
	scopes := req.URL.Query()["scope"]
	if req.Method == http.MethodPost {
		form, err := url.ParseQuery(string(body))
		if err != nil {
			fail(w, http.StatusBadRequest, "BAD", "form")
			return
		}
		scopes, named = form["scope"], true
		user, password = form.Get("username"), form.Get("password")
		if form.Get("grant_type") == "refresh_token" {
			user, password = "<token>", form.Get("refresh_token")
		}
	}
	want, ok := r.Users[user]
	if !ok || named && want != password {
		fail(w, http.StatusUnauthorized, "UNAUTHORIZED", "who are you?")
		return
	}
	g := grant{user: user}
	for _, one := range strings.Fields(strings.Join(scopes, " ")) {
		i := strings.LastIndexByte(one, ':')
		for a := range strings.SplitSeq(one[i+1:], ",") {
			if a == "pull" || user != "" && !r.Narrow {
				g.scopes = append(g.scopes, one[:i+1]+a)
			}
		}
	}
	if r.tokens == nil {
		r.tokens = map[string]grant{}
	}
	r.issued++
	token := fmt.Sprintf("token-%d-of-%s", r.issued, user)
	r.tokens[token] = g
	json.NewEncoder(w).Encode(map[string]any{"token": token, "access_token": token, "expires_in": 300})
}

// Expire makes all tokens issued so far invalid.
func (r *Registry) Expire() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.Expired == nil {
		r.Expired = map[string]bool{}
	}
	for t := range r.tokens {
		r.Expired[t] = true
	}
}

// Issued is how many tokens were issued.
func (r *Registry) Issued() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.issued
}
