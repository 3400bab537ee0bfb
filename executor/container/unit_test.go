//go:build linux && (amd64 || arm64)

package container

import (
	"strings"
	"testing"
)

func TestParseUnit(t *testing.T) {
	for path, want := range map[string]string{
		"": "/system.slice kilnrun-id.scope", "a.slice:b:c": "/a.slice b-c.scope", ":b:c": "/system.slice b-c.scope", "a-b-c.slice::x": "/a.slice/a-b.slice/a-b-c.slice x.scope",
		"-.slice:b:c": "/ b-c.scope",
	} {
		slice, unit, err := parseUnit(path, "id")
		if err != nil {
			t.Errorf("%q: %v", path, err)
			continue
		}
		if dir, err := sliceDir(slice); err != nil || dir+" "+unit != want {
			t.Errorf("%q: %s %s, %v; want %s", path, dir, unit, err, want)
		}
	}
	for path, want := range map[string]string{"/a/b": "slice:prefix:name", "a:b": "slice:prefix:name", "a.slice:b:": "slice:prefix:name", "a.slice:b:c.slice": "can't be a slice", "a.slice:b:c/d": "no slash"} {
		if _, _, err := parseUnit(path, "id"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v", path, err)
		}
	}
	for _, slice := range []string{"a", "", ".slice", "a--b.slice", "-a.slice", "a/b.slice"} {
		if dir, err := sliceDir(slice); err == nil {
			t.Errorf("%q is %s", slice, dir)
		}
	}
}
