package explain

import (
	"fmt"
	"testing"
)

// A build's steps become known one by one. It isn't compared with an earlier build
// anew for each of them, and yet never by less than most of what is known.
func TestKinshipIsKept(t *testing.T) {
	j := &Journal{builds: map[string]*build{"earlier": {Texts: []string{short("0"), short("1"), short("2")}}}}
	f := &family{texts: map[string]bool{}, claimed: map[uint64]bool{}, kin: map[string]kinship{}}
	compared, last := 0, kinship{at: -1}
	for i := range 5000 {
		f.add(step{Kind: "exec", Text: fmt.Sprint(i), Index: i})
		is := j.kinLocked("earlier", f)
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
