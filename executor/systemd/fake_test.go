//go:build linux && (amd64 || arm64)

package systemd

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	godbus "github.com/godbus/dbus/v5"
)

// fake is a systemd at the other end of a bus.
type fake struct {
	*testing.T
	mu      sync.Mutex // guards the fields below
	units   map[string]map[string]godbus.Variant
	calls   []string
	fail    map[string]string // error names by member
	results map[string]string // of jobs by member; done otherwise
	conns   []*peer
	job     uint32
}

// peer is a connection to the fake.
type peer struct {
	mu sync.Mutex // held while a message is written
	net.Conn
	in     *bufio.Reader
	serial uint32
}

// newFake listens at the address that the system bus has for this process.
func newFake(t *testing.T) *fake {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "bus")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path="+socket)
	f := &fake{T: t, units: map[string]map[string]godbus.Variant{}, fail: map[string]string{}, results: map[string]string{}}
	var served sync.WaitGroup
	served.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			p := &peer{Conn: conn, in: bufio.NewReader(conn)}
			f.mu.Lock()
			f.conns = append(f.conns, p)
			f.mu.Unlock()
			served.Go(func() {
				defer f.forget(p)
				if err := f.serve(p); err != nil && !isEnd(err) {
					t.Errorf("fake systemd: %v", err)
				}
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		f.mu.Lock()
		for _, p := range f.conns {
			p.Close()
		}
		f.mu.Unlock()
		served.Wait()
	})
	return f
}

// isEnd reports whether err is the end of a connection. That of a client which
// has not read all that it was sent, such as a signal, is a reset.
func isEnd(err error) bool {
	return slices.ContainsFunc([]error{io.EOF, net.ErrClosed, syscall.ECONNRESET, syscall.EPIPE}, func(end error) bool { return errors.Is(err, end) })
}

// forget closes a connection.
func (f *fake) forget(p *peer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	p.Close()
	f.conns = slices.DeleteFunc(f.conns, func(other *peer) bool { return other == p })
}

func (f *fake) serve(p *peer) error {
	if err := p.authenticate(); err != nil {
		return err
	}
	for {
		m, err := godbus.DecodeMessage(p.in)
		if err != nil {
			return err
		}
		if m.Type == godbus.TypeMethodCall {
			if err := f.answer(p, m); err != nil {
				return err
			}
		}
	}
}

// authenticate lets everybody in.
func (p *peer) authenticate() error {
	for {
		line, err := p.in.ReadString('\n')
		if err != nil {
			return err
		}
		answer := "ERROR\r\n"
		switch line = strings.Trim(line, "\x00\r\n"); {
		case line == "BEGIN":
			return nil
		case line == "AUTH":
			answer = "REJECTED EXTERNAL\r\n"
		case strings.HasPrefix(line, "AUTH EXTERNAL"):
			answer = "OK 0123456789abcdef0123456789abcdef\r\n"
		}
		if _, err := io.WriteString(p, answer); err != nil {
			return err
		}
	}
}

func (p *peer) send(m *godbus.Message, body ...any) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	m.Body = body
	if m.Headers == nil {
		m.Headers = map[godbus.HeaderField]godbus.Variant{}
	}
	if len(body) > 0 {
		m.Headers[godbus.FieldSignature] = godbus.MakeVariant(godbus.SignatureOf(body...))
	}
	p.serial++
	// The serial isn't exported: it is written over.
	var b strings.Builder
	if err := m.EncodeTo(&b, binary.LittleEndian); err != nil {
		return err
	}
	raw := []byte(b.String())
	binary.LittleEndian.PutUint32(raw[8:], p.serial)
	_, err := p.Write(raw)
	return err
}

func (p *peer) reply(to *godbus.Message, body ...any) error {
	return p.send(&godbus.Message{Type: godbus.TypeMethodReply, Headers: map[godbus.HeaderField]godbus.Variant{
		godbus.FieldReplySerial: godbus.MakeVariant(to.Serial()),
	}}, body...)
}

func (p *peer) refuse(to *godbus.Message, name string) error {
	return p.send(&godbus.Message{Type: godbus.TypeError, Headers: map[godbus.HeaderField]godbus.Variant{
		godbus.FieldReplySerial: godbus.MakeVariant(to.Serial()), godbus.FieldErrorName: godbus.MakeVariant(name),
	}}, "the fake says no")
}

// answer does what systemd does for a call.
func (f *fake) answer(p *peer, m *godbus.Message) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	member, _ := m.Headers[godbus.FieldMember].Value().(string)
	if name := f.fail[member]; name != "" {
		delete(f.fail, member)
		return p.refuse(m, name)
	}
	unit := ""
	if len(m.Body) > 0 {
		unit, _ = m.Body[0].(string)
	}
	switch member {
	case "Hello":
		return p.reply(m, ":1.1")
	case "AddMatch":
		return p.reply(m)
	}
	f.calls = append(f.calls, member+" "+unit)
	switch member {
	case "StartTransientUnit":
		f.units[unit] = map[string]godbus.Variant{}
		f.set(unit, m.Body[2])
		return f.begin(p, m, unit, member)
	case "StopUnit":
		if f.units[unit] == nil {
			return p.refuse(m, noSuchUnit)
		}
		delete(f.units, unit)
		return f.begin(p, m, unit, member)
	case "SetUnitProperties":
		f.set(unit, m.Body[2])
		return p.reply(m)
	case "ResetFailedUnit":
		if f.units[unit] == nil {
			return p.refuse(m, noSuchUnit)
		}
		return p.reply(m)
	}
	return fmt.Errorf("unexpected call %s", member)
}

// set notes properties, an array of names with values.
func (f *fake) set(unit string, list any) {
	for _, pair := range list.([][]any) {
		f.units[unit][pair[0].(string)] = pair[1].(godbus.Variant)
	}
}

// begin answers with a job, and tells everybody that it is done.
func (f *fake) begin(p *peer, m *godbus.Message, unit, member string) error {
	f.job++
	path := godbus.ObjectPath(fmt.Sprintf("/org/freedesktop/systemd1/job/%d", f.job))
	if err := p.reply(m, path); err != nil {
		return err
	}
	result := f.results[member]
	if result == "" {
		result = "done"
	}
	for _, other := range f.conns {
		err := other.send(&godbus.Message{Type: godbus.TypeSignal, Headers: map[godbus.HeaderField]godbus.Variant{
			godbus.FieldPath:      godbus.MakeVariant(godbus.ObjectPath("/org/freedesktop/systemd1")),
			godbus.FieldInterface: godbus.MakeVariant("org.freedesktop.systemd1.Manager"), godbus.FieldMember: godbus.MakeVariant("JobRemoved"),
		}}, f.job, path, unit, result)
		if err != nil && other == p {
			return err
		}
	}
	return nil
}

// unit returns the properties of one.
func (f *fake) unit(name string) map[string]godbus.Variant {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.units[name])
}

// refuseOnce has the next call of a method fail.
func (f *fake) refuseOnce(member, name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail[member] = name
}

// end has jobs of a method end with a result.
func (f *fake) end(member, result string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.results[member] = result
}

func (f *fake) called() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}
