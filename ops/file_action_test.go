package ops

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/ops/filetree"
	"github.com/kilnbuild/kiln/ops/filetree/treetest"
	"github.com/moby/buildkit/solver/pb"
	"golang.org/x/sys/unix"
)

// Every field of the protocol's copy counts in its place.
//
// compat: LLB-061, LLB-067
func TestFileCopy(t *testing.T) {
	plain := pb.FileActionCopy{Mode: -1, Timestamp: -1}
	owner := &filetree.Owner{UID: 1, GID: 2}
	for _, c := range []struct {
		name string
		set  func(*pb.FileActionCopy)
		want filetree.Copy
	}{
		{"nothing", func(*pb.FileActionCopy) {}, filetree.Copy{}},
		{"src", func(a *pb.FileActionCopy) { a.Src = "/s" }, filetree.Copy{Src: "/s"}},
		{"dest", func(a *pb.FileActionCopy) { a.Dest = "/d" }, filetree.Copy{Dest: "/d"}},
		{"mode", func(a *pb.FileActionCopy) { a.Mode = 0o604 }, filetree.Copy{Chmod: filetree.ChmodTo(0o604)}},
		{"mode 0", func(a *pb.FileActionCopy) { a.Mode = 0 }, filetree.Copy{Chmod: filetree.ChmodTo(0)}},
		{"timestamp", func(a *pb.FileActionCopy) { a.Timestamp = 3e9 + 4 }, filetree.Copy{Stamp: filetree.Stamp{Time: &unix.Timespec{Sec: 3, Nsec: 4}}}},
		{"timestamp before 1970", func(a *pb.FileActionCopy) { a.Timestamp = -2e9 }, filetree.Copy{Stamp: filetree.Stamp{Time: &unix.Timespec{Sec: -2}}}},
		{"followSymlink", func(a *pb.FileActionCopy) { a.FollowSymlink = true }, filetree.Copy{FollowLinks: true}},
		{"dirCopyContents", func(a *pb.FileActionCopy) { a.DirCopyContents = true }, filetree.Copy{Contents: true}},
		{"attemptUnpack", func(a *pb.FileActionCopy) { a.AttemptUnpackDockerCompatibility = true }, filetree.Copy{Unpack: true}},
		{"createDestPath", func(a *pb.FileActionCopy) { a.CreateDestPath = true }, filetree.Copy{MakeParents: true}},
		{"allowWildcard", func(a *pb.FileActionCopy) { a.AllowWildcard = true }, filetree.Copy{Wildcards: true}},
		{"allowEmptyWildcard", func(a *pb.FileActionCopy) { a.AllowEmptyWildcard = true }, filetree.Copy{AllowNone: true}},
		{"includePatterns", func(a *pb.FileActionCopy) { a.IncludePatterns = []string{"i"} }, filetree.Copy{Include: []string{"i"}}},
		{"excludePatterns", func(a *pb.FileActionCopy) { a.ExcludePatterns = []string{"e"} }, filetree.Copy{Exclude: []string{"e"}}},
		{"alwaysReplace", func(a *pb.FileActionCopy) { a.AlwaysReplaceExistingDestPaths = true }, filetree.Copy{Replace: true}},
		{"requiredPaths", func(a *pb.FileActionCopy) { a.RequiredPaths = []string{"r"} }, filetree.Copy{Required: []string{"r"}}},
	} {
		a := plain.CloneVT()
		c.set(a)
		c.want.Stamp.Owner = owner
		got, err := fileCopy(a, owner)
		if err != nil || !reflect.DeepEqual(got, &c.want) {
			t.Errorf("%s: got %+v, %v, want %+v", c.name, got, err, c.want)
		}
	}
}

// compat: LLB-062
func TestFileOwner(t *testing.T) {
	users := treetest.Tree("etc d").Make(t)
	if err := errors.Join(
		os.WriteFile(filepath.Join(users, "etc/passwd"), []byte("app:x:500:600::/:/bin/sh\n"), 0o644),
		os.WriteFile(filepath.Join(users, "etc/group"), []byte("grp:x:700:app\n"), 0o644),
	); err != nil {
		t.Fatal(err)
	}
	states := []string{users, treetest.Tree("etc d\netc/passwd c\netc/group p").Make(t)}
	root := func(i int) (filetree.Root, error) {
		fd, err := unix.Open(states[i], unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return filetree.Root{}, err
		}
		t.Cleanup(func() { unix.Close(fd) })
		return filetree.At(fd), nil
	}
	name := func(n string, in int64) *pb.UserOpt {
		return &pb.UserOpt{User: &pb.UserOpt_ByName{ByName: &pb.NamedUserOpt{Name: n, Input: in}}}
	}
	id := func(n uint32) *pb.UserOpt { return &pb.UserOpt{User: &pb.UserOpt_ByID{ByID: n}} }

	for _, c := range []struct {
		name        string
		user, group *pb.UserOpt
		want        filetree.Owner
		err         string
	}{
		{"nobody said", nil, nil, filetree.Owner{}, ""},
		{"user id", id(5), nil, filetree.Owner{UID: 5, GID: 5}, ""},
		{"group id", nil, id(6), filetree.Owner{GID: 6}, ""},
		{"both ids", id(5), id(6), filetree.Owner{UID: 5, GID: 6}, ""},
		{"large ids", id(4294967294), nil, filetree.Owner{UID: 4294967294, GID: 4294967294}, ""},
		{"user name", name("app", 0), nil, filetree.Owner{UID: 500, GID: 600}, ""},
		{"user and group name", name("app", 0), name("grp", 0), filetree.Owner{UID: 500, GID: 700}, ""},
		{"user id, group name", id(5), name("grp", 0), filetree.Owner{UID: 5, GID: 700}, ""},
		{"user name, group id", name("app", 0), id(6), filetree.Owner{UID: 500, GID: 6}, ""},
		{"user of the wrong kind of file", name("app", 1), nil, filetree.Owner{}, `look up user "app": open /etc/passwd: not a regular file`},
		{"group of the wrong kind of file", nil, name("grp", 1), filetree.Owner{}, `look up group "grp": open /etc/group: not a regular file`},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := fileOwner(&pb.ChownOpt{User: c.user, Group: c.group}, root)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Fatalf("error %v, want %q", err, c.err)
				}
				return
			}
			if err != nil || *got != c.want {
				t.Fatalf("got %v, %v, want %v", got, err, c.want)
			}
		})
	}
	if got, err := fileOwner(nil, root); got != nil || err != nil {
		t.Errorf("without an owner: %v, %v", got, err)
	}
}
