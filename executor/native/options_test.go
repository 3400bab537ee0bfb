//go:build linux && (amd64 || arm64)

package native

import (
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func TestParseMountOptions(t *testing.T) {
	o, err := parseMountOptions("bind", []string{"rbind", "ro", "nosuid", "rw", "rnoexec", "rslave", "size=4k"})
	if err != nil {
		t.Fatal(err)
	}
	if !o.bind || !o.rec || o.flags != unix.MS_NOSUID || o.set != unix.MOUNT_ATTR_NOSUID || o.clear != unix.MOUNT_ATTR_RDONLY ||
		o.setRec != unix.MOUNT_ATTR_NOEXEC || len(o.propagation) != 1 || strings.Join(o.data, ",") != "size=4k" {
		t.Errorf("%+v", o)
	}
	if _, err := parseMountOptions("bind", []string{"idmap=uids=0-1-2"}); err == nil || !strings.Contains(err.Error(), "uidMappings") {
		t.Errorf("error %v", err)
	}
	o, err = parseMountOptions("tmpfs", []string{"tmpcopyup", "ridmap"})
	if err != nil || !o.copyUp || !o.idmap || !o.idmapRec || len(o.data) > 0 {
		t.Errorf("%+v, %v", o, err)
	}
}

func TestParseCPUs(t *testing.T) {
	for list, want := range map[string][]uintptr{"0": {1}, "0-3,7": {0x8f}, "64": {0, 1}, " 1,2 ": {6}} {
		if got, err := parseCPUs(list); err != nil || !slices.Equal(got, want) {
			t.Errorf("%q: %x, %v; want %x", list, got, err, want)
		}
	}
	for _, list := range []string{"a", "3-1", "-1", "0-", "0,,1", "8192", "99999999999"} {
		if got, err := parseCPUs(list); err == nil {
			t.Errorf("%q is taken as %x", list, got)
		}
	}
}

func TestSchedAttr(t *testing.T) {
	good := specs.Scheduler{Policy: specs.SchedDeadline, Flags: []specs.LinuxSchedulerFlag{specs.SchedFlagReclaim, specs.SchedFlagDLOverrun}, Runtime: 1, Deadline: 2, Period: 3}
	want := unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_DEADLINE, Flags: unix.SCHED_FLAG_RECLAIM | unix.SCHED_FLAG_DL_OVERRUN, Runtime: 1, Deadline: 2, Period: 3}
	if got, err := schedAttr(&good); err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
	for want, bad := range map[string]specs.Scheduler{
		"policy": {Policy: "SCHED_ISO"}, "priority": {Policy: specs.SchedFIFO, Priority: -1}, "flags": {Policy: specs.SchedOther, Flags: []specs.LinuxSchedulerFlag{"X"}},
	} {
		if _, err := schedAttr(&bad); err == nil || !strings.Contains(err.Error(), "process.scheduler."+want) {
			t.Errorf("%s: error %v", want, err)
		}
	}
}
