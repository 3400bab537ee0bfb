//go:build linux && (amd64 || arm64)

package executor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// hostileRoot makes a root whose content an attacker chose: "-> target" is a
// symbolic link, "| " a FIFO, "/" a directory, anything else a file.
func hostileRoot(t *testing.T, files map[string]string) string {
	t.Helper()
	root := busyboxRoot(t)
	for name, content := range files {
		path := filepath.Join(root, name)
		mkdir(t, filepath.Dir(path))
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
		var err error
		if target, isLink := strings.CutPrefix(content, "-> "); isLink {
			err = os.Symlink(target, path)
		} else if content == "/" {
			err = os.Mkdir(path, 0o755)
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
	full := map[string]string{"proc": "/", "sys": "/", "dev": "/", "etc/hosts": "", "etc/resolv.conf": "", "x": "/"}
	e := newTest(t, Config{})
	for name, tc := range map[string]struct {
		files map[string]string
		want  string // of the error, if the step is refused
		ran   bool
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
		"/etc/passwd is a FIFO":               {files: map[string]string{"etc/passwd": "| ", "etc/group": "| "}, ran: true},
		"/etc/passwd is a disk":               {files: map[string]string{"etc/passwd": "disk", "etc/group": "disk"}, ran: true},
		"/etc/passwd is a link out":           {files: map[string]string{"etc/passwd": "-> ../../../../../../etc/shadow"}, ran: true},
		"/etc/hosts is a link to the root":    {files: map[string]string{"etc/hosts": "-> /"}, want: "mount point /etc/hosts"},
		"/etc/hosts is a link into /proc":     {files: map[string]string{"etc/hosts": "-> /proc/sys/kernel/core_pattern"}, want: "mount point /etc/hosts"},
		"/etc/resolv.conf is a link to /proc": {files: map[string]string{"etc/resolv.conf": "-> ../proc/self/mem"}, want: "mount point /etc/resolv.conf"},
		"/etc/hosts is a link out":            {files: map[string]string{"etc/hosts": "-> ../../../../etc/shadow"}, ran: true},
		"/etc/hosts is a FIFO":                {files: map[string]string{"etc/hosts": "| "}, ran: true},
		"/etc is a link out":                  {files: map[string]string{"etc": "-> ../../../../tmp"}, ran: true},
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
