//go:build linux && (amd64 || arm64)

package container

import (
	"testing"

	"github.com/kilnbuild/kiln/executor/cgroup"
)

func TestPlaceGroups(t *testing.T) {
	for _, tc := range []struct{ own, name, want string }{
		{"/system.slice/engine.service", "id", "/cg/system.slice/id"},
		{"/system.slice/engine.service", "a/b", "/cg/system.slice/a/b"},
		{"/system.slice/engine.service", "../../../b", "/cg/system.slice/b"},
		{"/system.slice/engine.service", "/a/b", "/cg/a/b"},
		{"/", "id", "/cg/id"},
		{"", "id", "/cg/id"},
	} {
		if got := placeGroups(&cgroup.Tree{V2: "/cg"}, map[string]string{"": tc.own}, tc.name); got.V2 != tc.want || got.V1 != nil {
			t.Errorf("%q in %q: %+v, want %s", tc.name, tc.own, got, tc.want)
		}
	}
	tree := &cgroup.Tree{V1: []cgroup.Hierarchy{{Dir: "/cg/memory", Controllers: []string{"memory"}}, {Dir: "/cg/cpu", Controllers: []string{"cpu", "cpuacct"}}}}
	got := placeGroups(tree, map[string]string{"memory": "/own", "cpu": "/"}, "id")
	if len(got.V1) != 2 || got.V1["memory"] != "/cg/memory/own/id" || got.V1["cpu,cpuacct"] != "/cg/cpu/id" {
		t.Errorf("%+v", got)
	}
}
