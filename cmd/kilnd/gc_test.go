package main

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/worker"
)

func size(n int64) worker.DiskSpace { return worker.DiskSpace{Bytes: n} }

// compat: DMN-017
// compat: DMN-043
// compat: DMN-044
// compat: DMN-049
// compat: DMN-095
func TestGCConfig(t *testing.T) {
	tests := map[string]struct {
		file string
		args []string
		want worker.GC
	}{
		"nothing":           {},
		"off by key":        {file: "gc = false", want: worker.GC{Off: true}},
		"off by flag":       {file: "gc = true", args: []string{"--oci-worker-gc=false"}, want: worker.GC{Off: true}},
		"on by flag":        {file: "gc = false", args: []string{"--oci-worker-gc"}},
		"sizes":             {file: "reservedSpace = 5\nmaxUsedSpace = '512MB'\nminFreeSpace = '10%'", want: worker.GC{Reserved: size(5), MaxUsed: size(512 << 20), MinFree: worker.DiskSpace{Percent: 10}}},
		"a size of nothing": {file: "reservedSpace = ''\nmaxUsedSpace = '1000'", want: worker.GC{MaxUsed: size(1000)}},
		"the old name":      {file: "gckeepstorage = 7000", want: worker.GC{Reserved: size(7000)}},
		"the new name wins": {file: "gckeepstorage = 7000\nminFreeSpace = 1", want: worker.GC{MinFree: size(1)}},
		"one number":        {file: "maxUsedSpace = 1", args: []string{"--oci-worker-gc-keepstorage", "2"}, want: worker.GC{Reserved: size(2e6)}},
		"three numbers":     {args: []string{"--oci-worker-gc-keepstorage", "2,3,4"}, want: worker.GC{Reserved: size(2e6), MinFree: size(3e6), MaxUsed: size(4e6)}},
		"rules": {
			file: `
[[worker.oci.gcpolicy]]
filters = ["type==source.local", "type==exec.cachemount"]
keepDuration = "48h"
maxUsedSpace = "1GB"
[[worker.oci.gcpolicy]]
all = true
keepBytes = "20%"
keepDuration = 3600
minFreeSpace = 3
[[worker.oci.gcpolicy]]
keepBytes = 1
reservedSpace = 2
`,
			want: worker.GC{Rules: []worker.GCRule{
				{Filters: []string{"type==source.local", "type==exec.cachemount"}, KeepDuration: 48 * time.Hour, MaxUsed: size(1 << 30)},
				{All: true, Reserved: worker.DiskSpace{Percent: 20}, KeepDuration: time.Hour, MinFree: size(3)},
				{Reserved: size(2)},
			}},
		},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			cfg, warnings, err := loaded(t, "[worker.oci]\n"+tc.file, tc.args...)
			must(t, err)
			if !reflect.DeepEqual(cfg.gc, tc.want) {
				t.Errorf("got %+v, want %+v", cfg.gc, tc.want)
			}
			if len(warnings) > 0 {
				t.Errorf("warnings %q", warnings)
			}
		})
	}
}

func TestGCConfigErrors(t *testing.T) {
	for file, want := range map[string]string{
		"maxUsedSpace = 'much'":                                 "worker.oci.maxUsedSpace",
		"minFreeSpace = '101%'":                                 "worker.oci.minFreeSpace",
		"minFreeSpace = 'x%'":                                   "worker.oci.minFreeSpace",
		"reservedSpace = -1":                                    "worker.oci.reservedSpace",
		"[[worker.oci.gcpolicy]]\nkeepDuration = 'long'":        "worker.oci.gcpolicy[0].keepDuration",
		"[[worker.oci.gcpolicy]]\nkeepBytes = '1Q'":             "worker.oci.gcpolicy[0].keepBytes",
		"[[worker.oci.gcpolicy]]\nfilters = ['type===x']":       "worker.oci.gcpolicy[0].filters",
		"[[worker.oci.gcpolicy]]\nfilter = ['type==x']":         "worker.oci.gcpolicy.filters",
		"[[worker.oci.gcpolicy]]\n[[worker.oci.gcpolicy]]\nx=1": "worker.oci.gcpolicy.x",
	} {
		if _, _, err := loaded(t, "[worker.oci]\n"+file); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v doesn't name %s", file, err, want)
		}
	}
	for _, value := range []string{"x", "1,x", "1,2,3,4", "-1", "1,,2"} {
		if _, _, err := loaded(t, "", "--oci-worker-gc-keepstorage", value); err == nil || !strings.Contains(err.Error(), "--oci-worker-gc-keepstorage") {
			t.Errorf("%q: error %v", value, err)
		}
	}
	_, warnings, err := loaded(t, "[[worker.oci.gcpolicy]]\nall = true\n", "--oci-worker-gc-keepstorage", "5")
	must(t, err)
	if len(warnings) != 1 || !strings.Contains(warnings[0], "gcpolicy") {
		t.Errorf("a flag that rules override: warnings %q", warnings)
	}
}
