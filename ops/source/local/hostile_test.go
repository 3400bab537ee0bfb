package local

import (
	"context"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tonistiigi/fsutil/types"
)

// script is a client that says what it has to say, whatever it is asked.
type script struct {
	packets []*types.Packet
}

func (s *script) SendMsg(any) error { return nil }

func (s *script) RecvMsg(m any) error {
	if len(s.packets) == 0 {
		return io.EOF
	}
	raw, err := s.packets[0].MarshalVT()
	if err != nil {
		return err
	}
	s.packets = s.packets[1:]
	return m.(*types.Packet).UnmarshalVT(raw)
}

func stat(path string, mode fs.FileMode, set ...func(*types.Stat)) *types.Packet {
	st := &types.Stat{Path: path, Mode: uint32(mode)}
	for _, f := range set {
		f(st)
	}
	return &types.Packet{Type: types.PACKET_STAT, Stat: st}
}

func size(n int64) func(*types.Stat)    { return func(st *types.Stat) { st.Size = n } }
func linkTo(s string) func(*types.Stat) { return func(st *types.Stat) { st.Linkname = s } }
func data(id uint32, s string) *types.Packet {
	return &types.Packet{Type: types.PACKET_DATA, ID: id, Data: []byte(s)}
}

var (
	endStat = &types.Packet{Type: types.PACKET_STAT}
	fin     = &types.Packet{Type: types.PACKET_FIN}
)

// compat: SES-045
func TestHostile(t *testing.T) {
	const dir = fs.ModeDir | 0o755
	many := []*types.Packet{}
	for i := range 300 {
		many = append(many, stat(string(rune(0x4e00+i)), 0o644, size(2)))
	}
	for i := range 300 {
		many = append(many, data(uint32(i), "x"))
	}
	tests := []struct {
		name    string
		packets []*types.Packet
		want    string
	}{
		{"absolute", []*types.Packet{stat("/etc", 0o644)}, "not a clean relative path"},
		{"parent", []*types.Packet{stat("..", dir)}, "not a clean relative path"},
		{"root", []*types.Packet{stat(".", dir)}, "not a clean relative path"},
		{"escape", []*types.Packet{stat("a", dir), stat("a/../../b", 0o644)}, "not a clean relative path"},
		{"empty name", []*types.Packet{stat("", 0o644)}, "invalid"},
		{"double slash", []*types.Packet{stat("a", dir), stat("a//b", 0o644)}, "not a clean relative path"},
		{"trailing slash", []*types.Packet{stat("a/", dir)}, "not a clean relative path"},
		{"null byte", []*types.Packet{stat("a\x00b", 0o644)}, "invalid"},
		{"out of order", []*types.Packet{stat("b", 0o644), stat("a", 0o644)}, "out of order"},
		{"twice", []*types.Packet{stat("a", 0o644), stat("a", 0o644)}, "out of order"},
		{"back into a directory", []*types.Packet{stat("a", dir), stat("b", dir), stat("a/x", 0o644)}, "out of order"},
		{"no directory", []*types.Packet{stat("a/b", 0o644)}, "out of order"},
		{"below a file", []*types.Packet{stat("a", 0o644), stat("a/b", 0o644)}, "out of order"},
		{"below a link", []*types.Packet{stat("a", fs.ModeSymlink|0o777, linkTo("/tmp")), stat("a/b", 0o644)}, "out of order"},
		{"socket", []*types.Packet{stat("a", fs.ModeSocket|0o644)}, "unsupported type"},
		{"irregular", []*types.Packet{stat("a", fs.ModeIrregular|0o644)}, "unsupported type"},
		{"negative size", []*types.Packet{stat("a", 0o644, size(-1))}, "size -1"},
		{"link to nothing", []*types.Packet{stat("a", 0o644, linkTo("b"))}, "isn't a file sent before"},
		{"link outside", []*types.Packet{stat("a", 0o644, linkTo("../../../etc/passwd"))}, "isn't a file sent before"},
		{"link to a symlink", []*types.Packet{stat("a", fs.ModeSymlink|0o777, linkTo("/etc/passwd")), stat("b", 0o644, linkTo("a"))}, "isn't a file sent before"},
		{"link to itself", []*types.Packet{stat("a", 0o644, linkTo("a"))}, "isn't a file sent before"},
		{"data for nothing", []*types.Packet{data(7, "x")}, "wasn't asked for"},
		{"data for a directory", []*types.Packet{stat("a", dir), data(0, "x")}, "wasn't asked for"},
		{"data after the end", []*types.Packet{stat("a", 0o644, size(1)), data(0, "x"), data(0, ""), data(0, "y")}, "wasn't asked for"},
		{"entry after the end", []*types.Packet{stat("a", 0o644, size(1)), endStat, stat("b", 0o644)}, "after the last one"},
		{"end too early", []*types.Packet{stat("a", 0o644, size(1)), endStat, fin}, "before it was complete"},
		{"stream ends", []*types.Packet{stat("a", 0o644, size(1)), data(0, "x")}, "before it was complete"},
		{"nothing", nil, "before it was complete"},
		{"client fails", []*types.Packet{{Type: types.PACKET_ERR, Data: []byte("disk on fire")}}, "disk on fire"},
		{"request", []*types.Packet{{Type: types.PACKET_REQ}}, "unknown type"},
		{"unknown packet", []*types.Packet{{Type: 99}}, "unknown type 99"},
		{"name too long", []*types.Packet{stat(strings.Repeat("n", 300), 0o644)}, "name too long"},
		{"too many at once", many, "files at the same time"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := newCopy(t)
			err := c.receiver(t).run(t.Context(), &script{packets: tt.packets})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
		})
	}
}

// TestThroughLink puts symbolic links where the state says that directories
// are: nothing may be written or removed behind them.
func TestThroughLink(t *testing.T) {
	src, c, outside := t.TempDir(), newCopy(t), t.TempDir()
	write(t, filepath.Join(src, "d/e/f"), "f", 0o644)
	write(t, filepath.Join(src, "d/e/gone"), "g", 0o644)
	c.sync(t, src)
	write(t, filepath.Join(outside, "gone"), "mine", 0o644)
	must(t, os.RemoveAll(filepath.Join(c.dir, "d/e")))
	must(t, os.Symlink(outside, filepath.Join(c.dir, "d/e")))

	for _, change := range []func(){
		func() { write(t, filepath.Join(src, "d/e/f"), "changed", 0o644) },
		func() { must(t, os.Remove(filepath.Join(src, "d/e/gone"))) },
		func() { must(t, os.Chmod(filepath.Join(src, "d/e"), 0o711)) },
	} {
		change()
		if err := transferFrom(t, c.receiver(t), src); err == nil {
			t.Error("a transfer through a link went well")
		}
	}
	sameTrees(t, map[string]string{"gone": describe(t, outside)["gone"]}, describe(t, outside))
	if st := must1(os.Stat(outside)); st.Mode().Perm() == 0o711 {
		t.Error("the directory behind the link was changed")
	}
}

// TestWriterFails shows that a transfer ends when the disk refuses.
func TestWriterFails(t *testing.T) {
	src, c := t.TempDir(), newCopy(t)
	for _, n := range []string{"a", "b", "c", "d"} {
		write(t, filepath.Join(src, n), strings.Repeat(n, 1<<20), 0o644)
	}
	write(t, filepath.Join(c.dir, "b"), "in the way", 0o644)
	err := transferFrom(t, c.receiver(t), src)
	if err == nil || !strings.Contains(err.Error(), "file exists") {
		t.Errorf("got %v", err)
	}
}

// TestCancel ends a transfer whose client has stopped.
func TestCancel(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	mine, theirs := newPipe(ctx)
	must(t, theirs.SendMsg(stat("a", 0o644, size(10))))
	done := make(chan error)
	c := newCopy(t)
	r := c.receiver(t)
	go func() { done <- r.run(ctx, mine) }()
	var req types.Packet
	must(t, theirs.RecvMsg(&req)) // it waits for data now
	cancel(io.ErrClosedPipe)
	select {
	case err := <-done:
		if err != io.ErrClosedPipe {
			t.Errorf("got %v", err)
		}
	case <-time.After(time.Minute):
		t.Fatal("it hangs")
	}
}

// FuzzReceive feeds arbitrary packets. Nothing may appear beside the copy.
func FuzzReceive(f *testing.F) {
	encode := func(packets ...*types.Packet) []byte {
		var out []byte
		for _, p := range packets {
			raw := must1(p.MarshalVT())
			out = append(out, byte(len(raw)), byte(len(raw)>>8))
			out = append(out, raw...)
		}
		return out
	}
	f.Add(encode(stat("a", 0o644, size(1)), endStat, data(0, "x"), data(0, ""), fin))
	f.Add(encode(stat("d", fs.ModeDir|0o755), stat("d/l", fs.ModeSymlink|0o777, linkTo("/")), stat("d/l/x", 0o644), endStat, fin))
	f.Add(encode(stat("a", 0o644, size(1)), data(0, "x"), data(0, ""), stat("b", 0o644, linkTo("a")), endStat, fin))
	f.Add(encode(stat("old", fs.ModeDir|0o755), stat("old/x", 0o600, size(3)), endStat, data(1, "abc"), data(1, ""), fin))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var packets []*types.Packet
		for len(raw) > 2 {
			n := int(raw[0]) | int(raw[1])<<8
			raw = raw[2:]
			n = min(n, len(raw))
			var p types.Packet
			if p.UnmarshalVT(raw[:n]) != nil {
				return
			}
			if p.Stat != nil && fs.FileMode(p.Stat.Mode)&fs.ModeDevice != 0 {
				return // no random devices on the machine that tests
			}
			packets = append(packets, &p)
			raw = raw[n:]
		}
		top := t.TempDir()
		c := newCopy(t)
		c.dir = filepath.Join(top, "copy")
		must(t, os.MkdirAll(filepath.Join(c.dir, "old"), 0o755))
		must(t, os.Symlink(top, filepath.Join(c.dir, "old/up")))
		c.receiver(t).run(t.Context(), &script{packets: packets})
		if n := len(must1(os.ReadDir(top))); n != 1 {
			t.Errorf("%d entries beside the copy", n-1)
		}
	})
}
