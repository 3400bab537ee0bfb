//go:build linux

package network

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// holdDir makes the test binary a daemon with networks in that directory.
const holdDir = "KILN_TEST_HOLD"

// hold has a namespace of each network in use until it is killed.
func hold(dir string) {
	cfg := Config{Mode: Mode(os.Getenv("KILN_TEST_MODE")), CNIConfig: os.Getenv("KILN_TEST_CNI"), CNIBinaries: os.Getenv("KILN_TEST_PLUGINS")}
	n, err := Open(dir, cfg, discard)
	if err == nil {
		_, err = n.Default.Take(context.Background(), User{})
	}
	fmt.Println("held:", err)
	select {}
}

// crash runs a daemon and kills it.
func crash(t *testing.T, dir string, cfg Config) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), holdDir+"="+dir, "KILN_TEST_MODE="+string(cfg.Mode), "KILN_TEST_CNI="+cfg.CNIConfig, "KILN_TEST_PLUGINS="+cfg.CNIBinaries)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	runtime.LockOSThread() // it ends with this thread, if not before
	defer runtime.UnlockOSThread()
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	cmd.Process.Kill() // it hasn't ended by itself
	cmd.Wait()         // as it was killed
	if err != nil || line != "held: <nil>\n" {
		t.Fatalf("daemon: %q, %v", line, err)
	}
}

// compat: DMN-122
func TestNothingIsLeftAfterACrash(t *testing.T) {
	cni, calls := cniConfig(t, "net.json", false)
	for _, cfg := range []Config{{Mode: Bridge}, cni} {
		t.Run(string(cfg.Mode), func(t *testing.T) {
			before := machine(t)
			dir := t.TempDir()
			for _, next := range []Mode{Host, cfg.Mode} { // whatever the mode is at the next start
				crash(t, dir, cfg)
				if machine(t) == before {
					t.Fatal("the crash left nothing: this test is blind")
				}
				after := cfg
				after.Mode = next
				n, err := Open(dir, after, discard)
				must(t, err)
				if next == Host && machine(t) != before {
					t.Errorf("left behind:\n%s\nbefore:\n%s", machine(t), before)
				}
				must(t, n.Close())
				if now := machine(t); now != before {
					t.Errorf("left behind:\n%s\nbefore:\n%s", now, before)
				}
				if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
					t.Errorf("files left behind: %v %v", left, err)
				}
			}
		})
	}
	adds, dels := 0, 0
	added := map[string]bool{} // others may have been killed before their namespace was made
	for _, c := range calls() {
		if strings.HasPrefix(c, "ADD") {
			adds++
			added[field(c, "id")] = true
		} else if dels++; added[field(c, "id")] && !strings.Contains(field(c, "netns"), filepath.Base(field(c, "id"))) {
			t.Errorf("the plugin didn't find the namespace of %s", c)
		}
	}
	if dels < adds {
		t.Errorf("%d were connected and %d disconnected", adds, dels)
	}
}

// After the machine was started again, plugins are asked without a namespace.
func TestCNIAfterReboot(t *testing.T) {
	cfg, calls := cniConfig(t, "net.json", false)
	dir := t.TempDir()
	crash(t, dir, cfg)
	left, err := os.ReadDir(cniDir(dir))
	must(t, err)
	for _, e := range left {
		// One that was just being made may not be mounted.
		if err := unix.Unmount(filepath.Join(cniDir(dir), e.Name()), unix.MNT_DETACH); err != nil && err != unix.EINVAL {
			t.Fatal(err)
		}
	}
	must(t, sweep(dir, cfg, discard))
	got := calls()
	if last := got[len(got)-1]; !strings.HasPrefix(last, "DEL") || field(last, "netns") != "" || field(last, "id") == "" {
		t.Errorf("last call: %s", last)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("files left behind: %v %v", left, err)
	}
}

// What can't be disconnected now stays to be found.
func TestCNIPluginIsGone(t *testing.T) {
	cfg, calls := cniConfig(t, "net.json", false)
	before := machine(t)
	dir := t.TempDir()
	crash(t, dir, cfg)
	must(t, sweep(dir, Config{CNIBinaries: t.TempDir()}, discard))
	if left, err := os.ReadDir(cniDir(dir)); err != nil || len(left) == 0 {
		t.Errorf("namespaces left: %v %v", left, err)
	}
	must(t, sweep(dir, cfg, discard))
	if got := calls(); !strings.HasPrefix(got[len(got)-1], "DEL") {
		t.Errorf("calls: %s", got)
	}
	if now := machine(t); now != before {
		t.Errorf("left behind:\n%s", now)
	}
}
