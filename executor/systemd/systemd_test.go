//go:build linux && (amd64 || arm64)

package systemd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/executor/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func ptr[T any](v T) *T { return &v }

// newUnitBundle makes a bundle of a container that is a unit with a limit.
func newUnitBundle(t *testing.T, id string) (dir string, spec *specs.Spec) {
	t.Helper()
	dir = t.TempDir()
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatalf("this test needs a static busybox: %v", err)
	}
	if err := errors.Join(os.MkdirAll(filepath.Join(dir, "rootfs/bin"), 0o755), os.WriteFile(filepath.Join(dir, "rootfs/bin/sleep"), busybox, 0o755)); err != nil {
		t.Fatal(err)
	}
	spec = container.Example()
	spec.Process.Terminal, spec.Process.Args = false, []string{"/bin/sleep", "1000"}
	spec.Root.Readonly = false
	spec.Linux.CgroupsPath = "-.slice:kiln:" + id
	spec.Linux.Resources.Pids = &specs.LinuxPids{Limit: ptr(int64(44))}
	return dir, spec
}

// nullIO is for processes that read and write nothing.
func nullIO(t *testing.T) container.IO {
	t.Helper()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { null.Close() })
	return container.IO{Stdio: [3]*os.File{null, null, null}}
}

// A container is a unit: systemd has its process, knows its limits and their
// changes, and forgets it when it is deleted.
func TestContainerIsUnit(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: it makes namespaces")
	}
	f, ctx := newFake(t), context.Background()
	id := fmt.Sprintf("kilntest-%d-unit", os.Getpid())
	bundle, spec := newUnitBundle(t, id)
	spec.Annotations = map[string]string{"org.systemd.property.TimeoutStopUSec": "uint64 1234", "other": "x"}
	r := container.New(t.TempDir())
	r.Systemd = Connect
	_, p, err := r.Create(ctx, id, spec, container.Options{IO: nullIO(t), Bundle: bundle, Systemd: true})
	if err != nil {
		t.Fatal(err)
	}
	name := "kiln-" + id + ".scope"
	unit := f.unit(name)
	for property, want := range map[string]any{
		"Slice": "-.slice", "PIDs": []uint32{uint32(p.Pid)}, "Delegate": true, "TasksMax": uint64(44), "TimeoutStopUSec": uint64(1234), "DefaultDependencies": false,
	} {
		if got := unit[property].Value(); !reflect.DeepEqual(got, want) {
			t.Errorf("%s is %v, want %v", property, got, want)
		}
	}
	own, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.Pid))
	if err != nil || !strings.Contains(string(own), ":/"+name+"\n") {
		t.Errorf("cgroups %s, %v", own, err)
	}
	again, err := r.Load(id) // as another process does
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Update(ctx, &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr(int64(55))}}); err != nil {
		t.Error(err)
	}
	if got := f.unit(name)["TasksMax"].Value(); got != uint64(55) {
		t.Errorf("after an update TasksMax is %v", got)
	}
	if err := again.Delete(ctx, true); err != nil {
		t.Error(err)
	}
	if _, err := p.Wait(ctx, 0); err != nil {
		t.Error(err)
	}
	if f.unit(name) != nil {
		t.Error("the unit is left")
	}
	if want := []string{"StartTransientUnit " + name, "SetUnitProperties " + name, "StopUnit " + name, "ResetFailedUnit " + name}; !slices.Equal(f.called(), want) {
		t.Errorf("calls %q, want %q", f.called(), want)
	}
}

func TestNoSystemd(t *testing.T) {
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path="+filepath.Join(t.TempDir(), "none"))
	units, err := Connect(context.Background())
	if _, serr := os.Stat("/run/systemd/private"); serr == nil {
		if err != nil {
			t.Fatalf("systemd runs here, and isn't reached without a bus: %v", err)
		}
		units.Close()
		return
	}
	if err == nil || !strings.Contains(err.Error(), "connect to systemd over D-Bus") || !strings.Contains(err.Error(), "leave out --systemd-cgroup") {
		t.Errorf("error %v", err)
	}
}

func TestUnitFails(t *testing.T) {
	f, ctx := newFake(t), context.Background()
	units, err := Connect(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer units.Close()
	u := container.Unit{Name: "kilntest.scope", Slice: "system.slice", Pid: os.Getpid()}
	f.refuseOnce("StartTransientUnit", "org.freedesktop.DBus.Error.AccessDenied")
	if err := units.Start(ctx, u); err == nil || !strings.Contains(err.Error(), "start unit kilntest.scope: the fake says no") {
		t.Errorf("error %v", err)
	}
	f.end("StartTransientUnit", "failed")
	if err := units.Start(ctx, u); err == nil || !strings.Contains(err.Error(), `the job ended as "failed"`) {
		t.Errorf("error %v", err)
	}
	// What failed is in the way, until it is reset.
	f.end("StartTransientUnit", "done")
	f.refuseOnce("StartTransientUnit", "org.freedesktop.systemd1.UnitExists")
	if err := units.Start(ctx, u); err != nil {
		t.Errorf("start again: %v", err)
	}
	for range 2 { // the second time it is gone
		if err := units.Stop(ctx, u.Name); err != nil {
			t.Errorf("stop: %v", err)
		}
	}
	u.Annotations = map[string]string{"org.systemd.property.X": "1"}
	if err := units.Start(ctx, u); err == nil || !strings.Contains(err.Error(), `"X" is not the name of a property`) {
		t.Errorf("error %v", err)
	}
	u.Annotations = map[string]string{"org.systemd.property.Nice": "uint64 x"}
	if err := units.Start(ctx, u); err == nil || !strings.Contains(err.Error(), "is not a value") {
		t.Errorf("error %v", err)
	}
	ended, cancel := context.WithCancelCause(ctx)
	cancel(errors.New("enough"))
	if err := units.Stop(ended, u.Name); err == nil {
		t.Error("stopped for nobody")
	}
}

func TestLimits(t *testing.T) {
	r := &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: ptr(int64(100)), Swap: ptr(int64(150)), Reservation: ptr(int64(50))},
		CPU:    &specs.LinuxCPU{Shares: ptr(uint64(1024)), Quota: ptr(int64(25_001)), Period: ptr(uint64(50_000))},
		Pids:   &specs.LinuxPids{Limit: ptr(int64(-1))},
	}
	for _, tc := range []struct {
		v2   bool
		want string
	}{
		{true, "MemoryMax=100 MemoryLow=50 MemorySwapMax=50 CPUWeight=39 CPUQuotaPeriodUSec=50000 CPUQuotaPerSecUSec=510000 TasksMax=18446744073709551615"},
		{false, "MemoryLimit=100 CPUShares=1024 CPUQuotaPerSecUSec=510000 TasksMax=18446744073709551615"},
	} {
		var got []string
		for _, p := range limits(tc.v2, r) {
			got = append(got, fmt.Sprintf("%s=%v", p.Name, p.Value.Value()))
		}
		if strings.Join(got, " ") != tc.want {
			t.Errorf("%q, want %q", got, tc.want)
		}
	}
	if got := limits(true, nil); got != nil {
		t.Errorf("%v", got)
	}
}
