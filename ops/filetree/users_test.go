package filetree

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/ops/filetree/treetest"
)

// compat: LLB-062
func TestUsers(t *testing.T) {
	users := treetest.Tree("etc d\nreal d").Make(t)
	if err := errors.Join(
		os.WriteFile(filepath.Join(users, "real/passwd"), []byte("root:x:0:0:root:/:/bin/sh\n# no user\napp:x:500:600::/:/bin/sh\napp:x:1:1::/:/bin/sh\n"), 0o644),
		os.Symlink("/real/passwd", filepath.Join(users, "etc/passwd")),
		os.WriteFile(filepath.Join(users, "etc/group"), []byte("root:x:0:\ngrp:x:700:app\n"), 0o644),
	); err != nil {
		t.Fatal(err)
	}
	bare := treetest.Tree("etc - 644 0:0 file").Make(t)
	special := treetest.Tree("etc d\netc/passwd c 644\netc/group p 644").Make(t)
	big := treetest.Tree("etc d").Make(t)
	if err := os.WriteFile(filepath.Join(big, "etc/passwd"), []byte(strings.Repeat("u:x:1:1::/:/bin/sh\n", 600_000)), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, dir   string
		user, group string
		want        Owner
		err         string
	}{
		{"user, through a link", users, "app", "", Owner{500, 600}, ""},
		{"group", users, "", "grp", Owner{0, 700}, ""},
		{"unknown user", users, "x", "", Owner{}, ""},
		{"unknown group", users, "", "y", Owner{}, ""},
		{"no users", bare, "app", "", Owner{}, ""},
		{"no groups", bare, "", "grp", Owner{}, ""},
		{"a device", special, "app", "", Owner{}, "open /etc/passwd: not a regular file"},
		{"a pipe", special, "", "grp", Owner{}, "open /etc/group: not a regular file"},
		{"too large", big, "app", "", Owner{}, "read /etc/passwd: it exceeds 10485760 bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got Owner
			var err error
			if r := rootOf(t, c.dir); c.user != "" {
				got, err = r.User(c.user)
			} else {
				got.GID, err = r.Group(c.group)
			}
			if (err == nil) != (c.err == "") || err != nil && err.Error() != c.err {
				t.Fatalf("error %v, want %q", err, c.err)
			}
			if err == nil && got != c.want {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}
