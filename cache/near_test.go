package cache

import "testing"

// A measurement that differs by a block or two is no damage; another file's is.
func TestNear(t *testing.T) {
	for _, c := range []struct {
		a, b int64
		want bool
	}{{716800, 712704, true}, {712704, 716800, true}, {0, 4096, true}, {100 << 20, 101 << 20, true}, {100 << 20, 103 << 20, false}, {0, 1 << 20, false}} {
		if near(c.a, c.b) != c.want {
			t.Errorf("near(%d, %d) is %t", c.a, c.b, !c.want)
		}
	}
}
