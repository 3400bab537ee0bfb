package store

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

func BenchmarkWriteSync(b *testing.B) {
	for _, n := range []int{1, 100} {
		b.Run(fmt.Sprint(n, "keys"), func(b *testing.B) {
			d := openAt(b, b.TempDir(), nil)
			value := make([]byte, 200)
			for i := 0; b.Loop(); i++ {
				batch := &Batch{}
				for k := range n {
					batch.Put("x", fmt.Sprintf("%08x", (i*n+k)*2654435761%1000003), value)
				}
				d.Write(batch)
				if err := d.Sync(context.Background()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkWrite(b *testing.B) {
	d, err := Open(Options{Root: b.TempDir()})
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	value := make([]byte, 200)
	for i := 0; b.Loop(); i++ {
		put := &Batch{}
		put.Put("x", fmt.Sprintf("%08x", i%100000), value)
		d.Write(put)
	}
}

func BenchmarkGet(b *testing.B) {
	d := openAt(b, b.TempDir(), nil)
	batch := &Batch{}
	for i := range 10000 {
		batch.Put("x", fmt.Sprintf("%08x", i), make([]byte, 200))
	}
	d.Write(batch)
	get := func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			if _, ok := d.Get("x", fmt.Sprintf("%08x", i%10000)); !ok {
				b.Fatal("missing")
			}
		}
	}
	b.Run("pending", get)
	mustSync(b, d)
	b.Run("stored", get)
}

// A start looks at every page.
func BenchmarkOpen(b *testing.B) {
	for _, n := range []int{1000, 30000, 300000} {
		b.Run(fmt.Sprint(n, "records"), func(b *testing.B) {
			root := manyRecords(b, n)
			for b.Loop() {
				openAndClose(b, root)
			}
		})
	}
}

// A start without the database replays the journal.
func BenchmarkOpenLost(b *testing.B) {
	root := manyRecords(b, 100000)
	for b.Loop() {
		if err := os.Remove(filepath.Join(root, fileName)); err != nil {
			b.Fatal(err)
		}
		openAndClose(b, root)
	}
}

func manyRecords(b *testing.B, n int) (root string) {
	b.Helper()
	root = b.TempDir()
	d, err := Open(Options{Root: root})
	if err != nil {
		b.Fatal(err)
	}
	batch := &Batch{}
	for i := range n {
		batch.Put("x", fmt.Sprintf("%08x", i*2654435761%100000007), make([]byte, 200))
	}
	d.Write(batch)
	if err := d.Close(); err != nil {
		b.Fatal(err)
	}
	return root
}

func openAndClose(b *testing.B, root string) {
	b.Helper()
	d, err := Open(Options{Root: root})
	if err != nil {
		b.Fatal(err)
	}
	if err := d.Close(); err != nil {
		b.Fatal(err)
	}
}
