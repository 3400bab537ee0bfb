package llb

import (
	"errors"
	"reflect"
	"testing"
)

func TestParseGitRepo(t *testing.T) {
	yes, no := true, false
	for in, want := range map[string]GitRepo{
		"https://example.com/a/b.git":                        {Remote: "https://example.com/a/b.git"},
		"https://example.com/b.git#v1:sub/../dir/":           {Remote: "https://example.com/b.git", Ref: "v1", SubDir: "dir"},
		"https://u:p@example.com/b.git?branch=x":             {Remote: "https://u:p@example.com/b.git", Ref: "refs/heads/x"},
		"https://example.com/b.git?tag=v1#refs/tags/v1":      {Remote: "https://example.com/b.git", Ref: "refs/tags/v1"},
		"http://example.com/b.git?ref=x&subdir=y&commit=abc": {Remote: "http://example.com/b.git", Ref: "x", SubDir: "y", Checksum: "abc"},
		"git://example.com/b?mtime=commit&fetch-by-commit":   {Remote: "git://example.com/b", MTime: "commit", FetchByCommit: true},
		"ssh://git@example.com/b?keep-git-dir&submodules=0":  {Remote: "ssh://git@example.com/b", KeepGitDir: &yes, Submodules: &no},
		"git@example.com:a/b.git?checksum=ff#main:x":         {Remote: "git@example.com:a/b.git", Ref: "main", SubDir: "x", Checksum: "ff"},
		"github.com/a/b#main":                                {Remote: "github.com/a/b", Ref: "main", LooksLocal: true},
	} {
		got, err := ParseGitRepo(in)
		if err != nil {
			t.Errorf("%s: %v", in, err)
		} else if !reflect.DeepEqual(*got, want) {
			t.Errorf("%s: got %+v, want %+v", in, *got, want)
		}
	}
}

func TestParseGitRepoErrors(t *testing.T) {
	for in, notGit := range map[string]bool{
		"dir/file":                                      true,
		"./github.com/x":                                true,
		"../x.git":                                      true,
		"https://example.com/file.tar.gz":               true,
		"ftp://example.com/x.git":                       true,
		"https://example.com/%zz.git":                   true,
		"https://example.com/b.git?nope=1":              false,
		"https://example.com/b.git?ref=a&ref=b":         false,
		"https://example.com/b.git?ref=":                false,
		"https://example.com/b.git?ref=a#b":             false,
		"https://example.com/b.git?subdir=a#:b":         false,
		"https://example.com/b.git?tag=a&branch=b":      false,
		"https://example.com/b.git?tag=a#b":             false,
		"https://example.com/b.git?mtime=now":           false,
		"https://example.com/b.git?submodules=maybe":    false,
		"https://example.com/b.git?commit=a&checksum=b": false,
	} {
		_, err := ParseGitRepo(in)
		if err == nil || errors.Is(err, ErrNotGit) != notGit {
			t.Errorf("%s: got %v, want not git: %v", in, err, notGit)
		}
	}
}

func FuzzParseGitRepo(f *testing.F) {
	f.Add("git@example.com:a/b.git?checksum=ff#main:x")
	f.Add("https://example.com/b.git?tag=v1#v1:dir")
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseGitRepo(s)
		if (r == nil) == (err == nil) {
			t.Errorf("%q: %v, %v", s, r, err)
		}
	})
}
