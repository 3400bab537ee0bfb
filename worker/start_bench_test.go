package worker

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// BenchmarkStart measures what a start costs for each of many records: until
// clients are answered (answer), which should be the same for all together however
// many they are, and until they can build (ready). It does so with
// a sound database and with one that is gone (lost), which is rebuilt from the
// journal, the seven or so entries of each record.
func BenchmarkStart(b *testing.B) {
	needRoot(b)
	for _, n := range []int{1000, 15000, 100000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			root := b.TempDir()
			w := quiet(b, root)
			fill(b, w, n)
			must(b, w.Close())
			s := &stages{b: b, cpu: map[string]time.Duration{}, wall: map[string]time.Duration{}}
			for b.Loop() {
				start(s, "", root, n)
				must(b, os.Remove(filepath.Join(root, "kiln.db")))
				start(s, "lost-", root, n)
				s.runs++
			}
			s.report()
		})
	}
}

func start(s *stages, how, root string, n int) {
	var w *Worker
	s.measure(how+"answer", n, func() {
		var err error
		w, err = Open(Config{Root: root, GC: GC{Off: true}})
		must(s.b, err)
	})
	s.measure(how+"ready", n, func() { must(s.b, w.Load(s.b.Context())) })
	must(s.b, w.Close())
}
