package explain

import (
	"fmt"
	"testing"

	"github.com/kilnbuild/kiln/solver"
)

// A build's steps become known one by one. It isn't compared with an earlier build
// anew for each of them, and yet never by less than most of what is known.
func TestKinshipIsKept(t *testing.T) {
	j := &Journal{builds: map[string]*build{"earlier": {Texts: []uint64{hash("0"), hash("1"), hash("2")}}}}
	f := &family{texts: map[uint64]bool{}, claimed: map[uint64]int{}, kin: map[string]kinship{}}
	compared, last := 0, kinship{at: -1}
	for i := range 5000 {
		f.add(step{Kind: "exec", Text: fmt.Sprint(i), Index: i})
		is := j.kinLocked("earlier", false, f)
		if k := f.kin["earlier"]; k != last {
			compared, last = compared+1, k
		}
		if i < 8 && is != (i < 6) {
			t.Errorf("with %d steps, of which 3 are the same, kin is %t", i+1, is)
		}
		if 9*last.at < 8*len(f.texts) {
			t.Fatalf("with %d steps kinship is that of %d", len(f.texts), last.at)
		}
	}
	if compared > 80 {
		t.Errorf("compared %d times for 5,000 steps", compared)
	}
	if !f.has(step{Kind: "exec", Text: "17", Index: 3}) || f.has(step{Kind: "file", Text: "17"}) {
		t.Error("the steps of the family aren't known")
	}
}

// Of hundreds that say the same, all older than those that are compared, the one
// that stands where the step does is found, and the one that is the same.
func TestNearestOfManyThatSayTheSame(t *testing.T) {
	const steps = 300
	j := newJournal(t)
	names := make([]string, steps)
	for i := range names {
		names[i] = fmt.Sprintf("[%d/%d] RUN make", i+1, steps)
	}
	j.sayTheSame(t, "before", names)
	b := j.builds[j.byKey([]string{shortKey(key("before0"))}).Build]
	b.Texts = append(b.Texts, 1, 2) // they have enough in common
	f := &family{project: short("project"), known: true, texts: map[uint64]bool{hash("RUN make"): true, 1: true, 2: true}, claimed: map[uint64]int{}, kin: map[string]kinship{}}
	for _, index := range []int{1, 7, steps} {
		v := &solver.Vertex{Name: fmt.Sprintf("[%d/%d] RUN make", index, steps)}
		at := &record{Step: stepOf(v), Op: "another"}
		if best, ok := j.nearest(at, f); !ok || best.Step.Index != index {
			t.Errorf("for step %d found %+v, %t", index, best.record, ok)
		}
		same := *j.byKey([]string{shortKey(key(fmt.Sprint("before", index-1)))})
		same.Step.Stage, same.Step.Index = "moved", 1
		if best, ok := j.nearest(&same, f); !ok || best.Step.Index != index || best.like != identical {
			t.Errorf("the same as step %d is %+v, %t", index, best.record, ok)
		}
	}
}

// The search ends where nothing can be nearer, and not before: of steps that say
// the same the one with the fewest differences is found, also when newer ones
// differ in little, and the same step wherever it is.
func TestNearestIsNotTheFirst(t *testing.T) {
	j := newJournal(t)
	j.readyLocked()
	rec := func(op, dest, mode string) *record {
		return &record{
			Origin: &Origin{Build: "before", Project: "p"}, Step: step{Kind: "file", Text: "mkfile"}, Op: op,
			Facets: facetsBy(map[string]string{"destination": dest, "mode": mode}),
		}
	}
	j.builds["before"] = &build{Texts: []uint64{hash("mkfile")}}
	j.learnLocked([]*record{rec("same", "/a", "0644"), rec("one", "/a", "0600"), rec("also one", "/a", "0400"), rec("two", "/b", "0600")})
	f := &family{project: "p", known: true, texts: map[uint64]bool{hash("mkfile"): true}, claimed: map[uint64]int{}, kin: map[string]kinship{}}
	for _, c := range []struct {
		now  *record
		want string
	}{
		{rec("same", "/a", "0644"), "same"},
		{rec("another", "/a", "0644"), "also one"},
		{rec("another", "/b", "0400"), "two"},
		{rec("another", "/c", "0600"), "two"},
	} {
		if best, ok := j.nearest(c.now, f); !ok || best.Op != c.want {
			t.Errorf("nearest to %v is %+v, %t, want %s", c.now.Facets.values(), best.record, ok, c.want)
		}
	}
}
