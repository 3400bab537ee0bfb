// Package record keeps what the solver did in builds as files, one a build, in
// the text format of solver/trace: a report from the field that replays as a
// test. Files hold digests, the names of steps and the texts of errors; what
// stands in their URLs beside host and path is left out. A Recorder bounds how
// many files there are, and how large each is.
package record

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/internal/version"
	"github.com/kilnbuild/kiln/solver"
	"github.com/kilnbuild/kiln/solver/trace"
)

const (
	// MaxFiles is how many recordings a directory has; the oldest go.
	MaxFiles = 50
	// MaxBytes is how large a recording gets; what comes after is left out.
	MaxBytes = 16 << 20
)

// suffix ends the names of recordings: other files in the directory are left
// alone.
const suffix = ".build.txt"

// Recorder makes recordings. Its methods are safe for concurrent use.
type Recorder struct {
	dir string
	log *slog.Logger
	max int // bytes of a recording

	mu sync.Mutex // held while the directory is changed
}

// Open makes dir, if it isn't there, and makes sure that files can be written to
// it.
func Open(dir string, log *slog.Logger) (*Recorder, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of recorded builds: %w", err)
	}
	try, err := os.CreateTemp(dir, "try-*")
	if err != nil {
		return nil, fmt.Errorf("write to the directory of recorded builds: %w", err)
	}
	if err := errors.Join(try.Close(), os.Remove(try.Name())); err != nil {
		return nil, fmt.Errorf("write to the directory of recorded builds: %w", err)
	}
	return &Recorder{dir: dir, log: log, max: MaxBytes}, nil
}

// Begin starts the recording of the build named ref. Nil, as when the file can't
// be made, records nothing.
func (r *Recorder) Begin(ref string) *Recording {
	if r == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.makeRoomLocked(); err != nil {
		r.log.Warn("remove old recordings of builds", "error", err)
	}
	now := time.Now().UTC()
	path := filepath.Join(r.dir, now.Format("20060102T150405.000000Z-")+fileName(ref)+suffix)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		r.log.Warn("a build is not recorded", "build", ref, "error", err)
		return nil
	}
	rec := &Recording{file: f, log: r.log, ref: ref, max: r.max}
	rec.write(fmt.Appendf(nil, "# Build %s, recorded by kilnd %s at %s.\n", plain(ref), version.Revision, now.Format(time.RFC3339)))
	return rec
}

// makeRoomLocked removes the oldest recordings until there is room for another.
func (r *Recorder) makeRoomLocked() error {
	names, err := filepath.Glob(filepath.Join(r.dir, "*"+suffix))
	if err != nil {
		return err
	}
	slices.Sort(names) // by time
	for len(names) >= MaxFiles {
		if err := os.Remove(names[0]); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		names = names[1:]
	}
	return nil
}

// maxName bounds the part of a file's name that a client chose.
const maxName = 64

var notInNames = regexp.MustCompile(`[^A-Za-z0-9_.-]+`)

func plain(ref string) string { return notInNames.ReplaceAllString(ref, "_") }

func fileName(ref string) string {
	name := plain(ref)
	return name[:min(len(name), maxName)]
}

// Recording is the file of a build that runs. It gets each event before its
// effects are performed, at once, so that a build that hangs or ends with the
// daemon has told what came before.
type Recording struct {
	file *os.File // nil once nothing more is written
	log  *slog.Logger
	ref  string
	max  int
	size int
}

// Trace is a solver.BuildOptions.Trace.
func (rec *Recording) Trace(ev solver.Event, effects []solver.Effect) {
	if rec.file == nil {
		return
	}
	var text bytes.Buffer
	for _, line := range trace.Lines(ev, effects) {
		text.WriteString(redact(line))
		text.WriteByte('\n')
	}
	if rec.size+text.Len() > rec.max {
		rec.write(fmt.Appendf(nil, "\n# Cut off: a recording has at most %d bytes.\n", rec.max))
		rec.Close()
		return
	}
	rec.write(text.Bytes())
}

// write writes whole paragraphs. A recording that can't go on ends: the build is
// none the worse.
func (rec *Recording) write(text []byte) {
	n, err := rec.file.Write(text)
	rec.size += n
	if err != nil {
		rec.log.Warn("the recording of a build ends early", "build", rec.ref, "error", err)
		rec.Close()
	}
}

// Close ends the recording.
func (rec *Recording) Close() {
	if rec.file == nil {
		return
	}
	if err := rec.file.Close(); err != nil {
		rec.log.Warn("close the recording of a build", "build", rec.ref, "error", err)
	}
	rec.file = nil
}

// userinfo and query are what URLs in names and errors may say in confidence.
var (
	userinfo = regexp.MustCompile(`://[^/\s"\\@]*@`)
	query    = regexp.MustCompile(`(://[^\s"\\?]*\?)[^\s"\\#]+`)
)

func redact(line string) string {
	if !strings.Contains(line, "://") {
		return line
	}
	return query.ReplaceAllString(userinfo.ReplaceAllString(line, "://-@"), "${1}-")
}
