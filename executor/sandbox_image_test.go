//go:build linux && (amd64 || arm64)

package executor

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// hostileRoot makes a root whose content an attacker chose: "-> target" is a
// symbolic link, "| " a FIFO, "/" a directory, "huge" a file of 1 GB, anything
// else a file.
func hostileRoot(t *testing.T, files map[string]string) string {
	t.Helper()
	root := busyboxRoot(t)
	for _, name := range slices.Sorted(maps.Keys(files)) { // directories before what is in them
		content, path := files[name], filepath.Join(root, name)
		mkdir(t, filepath.Dir(path))
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
		var err error
		if target, isLink := strings.CutPrefix(content, "-> "); isLink {
			err = os.Symlink(target, path)
		} else if content == "/" {
			err = os.Mkdir(path, 0o755)
		} else if content == "huge" {
			err = errors.Join(os.WriteFile(path, []byte("root:x:0:0::/:\n"), 0o644), os.Truncate(path, 1<<30))
		} else if content == "| " {
			err = unix.Mkfifo(path, 0o644)
		} else if content == "disk" {
			err = unix.Mknod(path, unix.S_IFBLK|0o666, int(unix.Mkdev(7, 0)))
		} else {
			err = os.WriteFile(path, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// An image can hold anything where a container has files of its own. Either
// the step is refused, or it runs and is confined as ever.
func TestHostileImages(t *testing.T) {
	// Prints what must not be there: something of /proc that is masked or that
	// can be written, wherever the attack may have put it.
	const look = `for p in /proc /.. /../.. /sys /x /dev /etc /tmp; do
		[ -s $p/keys ] || [ -s $p/timer_list ] && echo unmasked $p
		(echo attacked > $p/sys/kernel/domainname) 2>/dev/null && echo written $p
		(echo attacked > $p/kernel/domainname) 2>/dev/null && echo written below $p
		[ -d $p/firmware/acpi ] && echo unmasked $p
	done; [ -c /dev/null ] && [ -r /proc/self/status ] && grep -q '^Seccomp:.2' /proc/self/status && echo ran`
	each(t, ours(t), func(t *testing.T, e *executor) { hostileImages(t, e, look) })
}

func hostileImages(t *testing.T, e *executor, look string) {
	full := map[string]string{"proc": "/", "sys": "/", "dev": "/", "etc/hosts": "", "etc/resolv.conf": "", "x": "/"}
	for name, tc := range map[string]struct {
		files map[string]string
		want  string // of the error, if the step is refused
		ran   bool
		user  string
		cwd   string
	}{
		"control":                           {ran: true},
		"/proc is a link to the root":       {files: map[string]string{"proc": "-> /"}, want: "mount point /proc"},
		"/proc is a link to /sys":           {files: map[string]string{"proc": "-> /sys"}, want: "mount point /proc"},
		"/proc is a link elsewhere":         {files: map[string]string{"proc": "-> x"}, want: "mount point /proc"},
		"/proc is a file":                   {files: map[string]string{"proc": "x"}, want: "/proc"},
		"/proc is a FIFO":                   {files: map[string]string{"proc": "| "}, want: "/proc"},
		"/sys is a link to the root":        {files: map[string]string{"sys": "-> /"}, want: "mount point /sys"},
		"/sys is a link to /proc":           {files: map[string]string{"sys": "-> /proc"}, want: "mount point /sys"},
		"/dev is a link to the root":        {files: map[string]string{"dev": "-> /"}, want: "mount point /dev"},
		"/dev is a link to /proc":           {files: map[string]string{"dev": "-> /proc"}, want: "mount point /dev"},
		"/dev is a link to /proc/sys":       {files: map[string]string{"dev": "-> /proc/sys"}, want: "mount point /dev"},
		"/dev is a link to /proc/self/root": {files: map[string]string{"dev": "-> /proc/self/root"}, want: "mount point /dev"},
		"/dev is a link to a directory":     {files: map[string]string{"dev": "-> x"}, ran: true},
		"/dev has nodes and links": {files: map[string]string{"dev": "/", "dev/null": "-> /proc/sys/kernel/core_pattern", "dev/zero": "disk", "dev/pts": "-> /etc",
			"dev/shm": "-> /proc", "dev/ptmx": "| ", "dev/stdin": "x"}, ran: true},
		"/etc/passwd is a FIFO":                 {files: map[string]string{"etc/passwd": "| ", "etc/group": "| "}, ran: true},
		"/etc/passwd is a disk":                 {files: map[string]string{"etc/passwd": "disk", "etc/group": "disk"}, ran: true},
		"/etc/passwd is a link out":             {files: map[string]string{"etc/passwd": "-> ../../../../../../etc/shadow"}, ran: true},
		"/etc/hosts is a link to the root":      {files: map[string]string{"etc/hosts": "-> /"}, want: "mount point /etc/hosts"},
		"/etc/hosts is a link into /proc":       {files: map[string]string{"etc/hosts": "-> /proc/sys/kernel/core_pattern"}, want: "mount point /etc/hosts"},
		"/etc/resolv.conf is a link to /proc":   {files: map[string]string{"etc/resolv.conf": "-> ../proc/self/mem"}, want: "mount point /etc/resolv.conf"},
		"/etc/hosts is a link out":              {files: map[string]string{"etc/hosts": "-> ../../../../etc/shadow"}, ran: true},
		"/etc/hosts is a FIFO":                  {files: map[string]string{"etc/hosts": "| "}, ran: true},
		"/etc/hosts is a directory":             {files: map[string]string{"etc/hosts": "/"}, want: "/etc/hosts"},
		"/etc/resolv.conf is a directory":       {files: map[string]string{"etc/resolv.conf": "/"}, want: "/etc/resolv.conf"},
		"/etc/resolv.conf is a FIFO":            {files: map[string]string{"etc/resolv.conf": "| "}, ran: true},
		"/etc/resolv.conf is a link to a FIFO":  {files: map[string]string{"etc/resolv.conf": "-> /x/f", "x/f": "| "}, ran: true},
		"/etc/resolv.conf is a link to itself":  {files: map[string]string{"etc/resolv.conf": "-> resolv.conf"}, want: "/etc/resolv.conf"},
		"/etc/passwd is huge":                   {files: map[string]string{"etc/passwd": "huge", "etc/group": "huge"}, ran: true},
		"a user in a huge /etc/passwd":          {files: map[string]string{"etc/passwd": "huge"}, user: "builder", want: "exceeds"},
		"a user in a huge /etc/group":           {files: map[string]string{"etc/group": "huge"}, user: "builder", want: "exceeds"},
		"a user in a FIFO":                      {files: map[string]string{"etc/passwd": "| "}, user: "builder", want: "not a regular file"},
		"a user in a link to /proc":             {files: map[string]string{"etc/passwd": "-> /proc/self/environ"}, user: "builder", want: "builder"},
		"a user in a link out":                  {files: map[string]string{"etc/passwd": "-> ../../../../../etc/passwd"}, user: "nobody", want: "nobody"},
		"working directory by a link out":       {files: map[string]string{"x/l": "-> ../../../../../tmp"}, cwd: "/x/l/../../made", ran: true},
		"working directory by a link to itself": {files: map[string]string{"x/l": "-> l"}, cwd: "/x/l", want: "working dir"},
		"working directory below a file":        {files: map[string]string{"x": "f"}, cwd: "/x/made", want: "/x"},
		"working directory by a link to /proc":  {files: map[string]string{"x/l": "-> /proc/1/root"}, cwd: "/x/l", ran: true},
		"/etc is a link out":                    {files: map[string]string{"etc": "-> ../../../../tmp"}, ran: true},
	} {
		t.Run(strings.ReplaceAll(name, "/", "."), func(t *testing.T) {
			files := map[string]string{}
			for k, v := range full {
				if _, isLink := strings.CutPrefix(tc.files["etc"], "-> "); !isLink || !strings.HasPrefix(k, "etc/") {
					files[k] = v
				}
			}
			for k, v := range tc.files {
				files[k] = v
			}
			p := process(t, look)
			p.User, p.Cwd = tc.user, tc.cwd
			p.Root, _ = overlay(t, hostileRoot(t, files))
			r := attack(t, e, p)
			switch {
			case tc.ran && (r.err != nil || r.stdout != "ran\n"):
				t.Errorf("%v, the step says %q", r.err, r.stdout)
			case !tc.ran && (r.err == nil || !strings.Contains(r.err.Error(), tc.want) || r.stdout != ""):
				t.Errorf("error %v, want one about %s; the step says %q", r.err, tc.want, r.stdout)
			}
		})
	}
}
