package explain

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/kilnbuild/kiln/internal/explanation"
)

// maxRecord bounds what a record takes in the store.
const maxRecord = 768

// maxInputs bounds those of a step that is kept. Each takes six bytes at least
// when it is packed: hashes stay as long as they are.
const maxInputs = maxRecord / 6

// fit makes r small enough to be stored: what doesn't fit is left out, the least
// telling part first.
func (r *record) fit() error {
	size, err := r.size()
	for i := 0; err == nil && size > maxRecord && i < len(groups); i++ {
		r.Facets = r.Facets.values().fold(groups[i]).facets(nil)
		size, err = r.size()
	}
	if err == nil && size > maxRecord {
		r.Sketch = nil
		size, err = r.size()
	}
	if err == nil && size > maxRecord {
		return fmt.Errorf("it takes %d bytes, more than %d", size, maxRecord)
	}
	return err
}

// size is what r alone takes in the store.
func (r *record) size() (int, error) {
	if n := r.bound(); n <= maxRecord {
		return n, nil
	}
	data, err := packRecords([]*record{r})
	return len(data), err
}

// bound is no less than r takes.
func (r *record) bound() int {
	const each = 4 // the lengths of most
	n := len(r.Build) + len(r.Project) + len(r.Step.Kind) + len(r.Step.Stage) + len(r.Step.Text) + len(r.Op) + len(r.Sketch) + 16*each
	for _, f := range r.Facets {
		n += 2*each + len(f.name) + len(f.value)
	}
	for _, in := range r.Inputs {
		n += 3*each + len(in.Content) + len(in.Select)
		for _, k := range in.Keys {
			n += each + len(k)
		}
	}
	for _, list := range [][]string{r.Keys, r.Results} {
		for _, s := range list {
			n += each + len(s)
		}
	}
	return n
}

// packRecords is the stored form of records, which begins with how many they
// are.
func packRecords(records []*record) ([]byte, error) {
	p := newPacker(128*len(records), 4*len(records))
	for _, r := range records {
		p.record(r)
	}
	data, err := p.packed(len(records) * maxRecord / 2)
	return append(binary.AppendUvarint(nil, uint64(len(records))), data...), err
}

// countRecords reads how many records there are in data.
func countRecords(data []byte) int {
	n, size := binary.Uvarint(data)
	if size <= 0 || n > packedCap {
		return 0
	}
	return int(n)
}

func unpackRecords(data []byte) (records []*record, err error) {
	n, size := binary.Uvarint(data)
	if size <= 0 {
		return nil, errDamaged
	}
	u := newUnpacker(data[size:])
	for ; n > 0 && u.err == nil; n-- {
		records = append(records, u.record())
	}
	if len(u.data) > 0 {
		u.fail()
	}
	return records, u.err
}

func (p *packer) record(r *record) {
	p.string(r.Build)
	p.number(uint64(r.Time))
	p.string(r.Project)
	p.string(r.Step.Kind)
	p.string(r.Step.Stage)
	p.number(uint64(r.Step.Index))
	p.string(r.Step.Text)
	p.own(r.Op)
	p.number(uint64(len(r.Facets)))
	for _, f := range r.Facets {
		p.string(f.name)
		p.string(f.value)
	}
	p.number(uint64(len(r.Inputs)))
	for _, in := range r.Inputs {
		p.string(in.Content)
		p.texts(in.Keys, (*packer).string)
		p.string(in.Select)
	}
	p.texts(r.Keys, (*packer).string)
	p.texts(r.Results, (*packer).own)
	p.bytes(r.Sketch)
	p.flag(r.Failed)
}

func (u *unpacker) record() *record {
	r := &record{Origin: &Origin{Build: u.string(), Time: int64(u.number()), Project: u.string()}}
	r.Step = step{Kind: u.string(), Stage: u.string(), Index: int(u.number()), Text: u.string()}
	r.Op = u.string()
	given := make(values, u.count())
	for i := range given {
		given[i] = facet{u.string(), u.string()}
	}
	r.Facets = given.facets(u.facets)
	u.facets = r.Facets
	r.Inputs = make([]inputFact, u.count())
	for i := range r.Inputs {
		r.Inputs[i] = inputFact{Content: u.string(), Keys: u.texts(), Select: u.string()}
	}
	r.Keys, r.Results, r.Sketch, r.Failed = u.texts(), u.texts(), u.bytes(), u.flag()
	return r
}

// compressBuild is from how many bytes on an explanation is compressed.
const compressBuild = 4096

func (b *build) pack() ([]byte, error) {
	p := newPacker(64*len(b.Steps), len(b.Steps))
	p.string(b.Ref)
	p.time(b.Started)
	p.time(b.Ended)
	p.flag(b.Failed)
	p.number(uint64(len(b.Texts)))
	for _, t := range b.Texts {
		p.out = binary.LittleEndian.AppendUint64(p.out, t)
	}
	p.number(uint64(len(b.Args)))
	for name, value := range b.Args {
		p.string(name)
		p.string(value)
	}
	p.number(uint64(len(b.Steps)))
	for i := range b.Steps {
		p.step(&b.Steps[i])
	}
	return p.packed(compressBuild)
}

func unpackBuild(data []byte) (*build, error) {
	u := newUnpacker(data)
	b := &build{Build: explanation.Build{Ref: u.string(), Started: u.time(), Ended: u.time(), Failed: u.flag()}}
	if n := u.count(); n <= len(u.data)/8 {
		b.Texts = make([]uint64, n)
	} else {
		u.fail()
	}
	for i := range b.Texts {
		b.Texts[i], u.data = binary.LittleEndian.Uint64(u.data), u.data[8:]
	}
	b.Args = map[string]string{}
	for range u.count() {
		name := u.string()
		b.Args[name] = u.string()
	}
	for range u.count() {
		b.Steps = append(b.Steps, u.step())
	}
	if len(u.data) > 0 {
		u.fail()
	}
	return b, u.err
}

// time is written in nanoseconds from 1970 on, 0 if there is none.
func (p *packer) time(t time.Time) {
	if t.IsZero() {
		p.number(0)
		return
	}
	p.number(uint64(t.UnixNano()))
}

func (u *unpacker) time() time.Time {
	if n := u.number(); n != 0 {
		return time.Unix(0, int64(n)).UTC()
	}
	return time.Time{}
}

func (p *packer) step(s *explanation.Step) {
	p.string(s.Name)
	p.string(s.Line)
	p.flag(s.Ran)
	if !s.Ran {
		p.flag(s.Failed)
		return
	}
	p.flag(s.Failed)
	p.number(uint64(s.Duration))
	p.causes(s.Causes)
	p.flag(s.Compared != nil)
	if s.Compared != nil {
		p.string(s.Compared.Ref)
		p.time(s.Compared.Time)
	}
}

func (u *unpacker) step() explanation.Step {
	s := explanation.Step{Name: u.string(), Line: u.string(), Ran: u.flag(), Failed: u.flag()}
	if !s.Ran {
		return s
	}
	s.Duration = time.Duration(u.number())
	s.Causes = u.causes(maxDepth)
	if u.flag() {
		s.Compared = &explanation.Earlier{Ref: u.string(), Time: u.time()}
	}
	return s
}

func (p *packer) causes(all []explanation.Cause) {
	p.number(uint64(len(all)))
	for i := range all {
		c := &all[i]
		for _, s := range []string{string(c.Kind), c.Subject, c.From, c.To} {
			p.string(s)
		}
		p.time(c.Time)
		p.flag(c.Certain)
		p.causes(c.By)
	}
}

func (u *unpacker) causes(depth int) (all []explanation.Cause) {
	for range u.count() {
		if depth == 0 {
			u.fail()
			return nil
		}
		c := explanation.Cause{Kind: explanation.Kind(u.string()), Subject: u.string(), From: u.string(), To: u.string(), Time: u.time(), Certain: u.flag()}
		c.By = u.causes(depth - 1)
		all = append(all, c)
	}
	return all
}
