package history

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/docker/go-units"
	"github.com/kilnbuild/kiln/internal/steplog"
	control "github.com/moby/buildkit/api/services/control"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// logsOf is the directory with the logs of a build's steps, by vertex. Steps that
// several builds shared have their log, one file, in each one's.
func (l *Log) logsOf(ref string) string { return filepath.Join(l.cfg.Logs, nameOf(ref)) }

// LogsDir is the directory of all of them, "" if there is none.
func (l *Log) LogsDir() string { return l.cfg.Logs }

// nameOf makes a file name of what a client may choose.
func nameOf(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:])
}

// KeepLogs keeps the whole logs of a build's steps, by vertex, for Replay. It is
// called before Completed, whose batch makes them durable; they go with the record.
func (l *Log) KeepLogs(ref string, logs map[string]*steplog.Log) error {
	if l.cfg.Logs == "" || len(logs) == 0 {
		return nil
	}
	dir := l.logsOf(ref)
	// A build with the same name may have been before.
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o700)); err != nil {
		return fmt.Errorf("make a directory for the logs of steps: %w", err)
	}
	var errs []error
	for vertex, log := range logs {
		errs = append(errs, log.Save(filepath.Join(dir, nameOf(vertex))))
	}
	return errors.Join(append(errs, l.limitLogs(ref))...)
}

// limitLogs removes the logs of the oldest builds while all take more than they
// may. Those of the build ref, which is the newest, and of pinned records stay.
func (l *Log) limitLogs(ref string) error {
	if l.cfg.MaxLogs == 0 {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.logSizes[ref] = sizeOfLogs(l.logsOf(ref))
	total := int64(0)
	for _, size := range l.logSizes {
		total += size
	}
	var errs []error
	for _, rec := range slices.Backward(l.newestLocked()) {
		if total <= l.cfg.MaxLogs {
			break
		}
		if size := l.logSizes[rec.Ref]; size > 0 && rec.Ref != ref && !rec.Pinned {
			errs = append(errs, l.dropLogsLocked(rec.Ref))
			total -= size
		}
	}
	return errors.Join(errs...)
}

// sizeOfLogs is what the logs in dir take on disk, some more if builds share some.
func sizeOfLogs(dir string) (size int64) {
	entries, _ := os.ReadDir(dir) // what can't be read isn't there
	for _, e := range entries {
		if info, err := e.Info(); err == nil {
			if st, ok := info.Sys().(*syscall.Stat_t); ok {
				size += st.Blocks * 512
			}
		}
	}
	return size
}

// sweepLogs removes the logs of builds that there is no record of: the daemon died
// between the two.
func (l *Log) sweepLogs() error {
	if l.cfg.Logs == "" {
		return nil
	}
	entries, err := os.ReadDir(l.cfg.Logs)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	known := map[string]string{}
	for ref := range l.ended {
		known[nameOf(ref)] = ref
	}
	var errs []error
	for _, e := range entries {
		dir := filepath.Join(l.cfg.Logs, e.Name())
		if ref, ok := known[e.Name()]; ok {
			l.logSizes[ref] = sizeOfLogs(dir)
		} else {
			errs = append(errs, os.RemoveAll(dir))
		}
	}
	return errors.Join(errs...)
}

func (l *Log) dropLogsLocked(ref string) error {
	if l.cfg.Logs == "" {
		return nil
	}
	delete(l.logSizes, ref)
	return os.RemoveAll(l.logsOf(ref))
}

// replayPart bounds the bytes of one message, roughly.
const replayPart = 1 << 20

// Replay sends what Told has returned, with the whole logs of steps where they
// belong. They are read as fast as send takes them.
func (l *Log) Replay(ref string, told []*control.StatusResponse, send func(*control.StatusResponse) error) error {
	for _, msg := range told {
		var logs []*control.VertexLog
		var stored []*control.VertexLog
		for _, entry := range msg.Logs {
			if len(entry.Msg) == 0 {
				stored = append(stored, entry)
			} else {
				logs = append(logs, entry)
			}
		}
		msg.Logs = logs
		if err := send(msg); err != nil {
			return err
		}
		for _, entry := range stored {
			if err := l.replayLog(ref, entry, send); err != nil {
				return err
			}
		}
	}
	return nil
}

// replayLog sends the whole log of the vertex of entry. That it is missing is said
// in its place.
func (l *Log) replayLog(ref string, entry *control.VertexLog, send func(*control.StatusResponse) error) error {
	missing := func(err error) error {
		entry.Stream, entry.Msg = 2, []byte("\n[output is missing here: "+err.Error()+"]\n")
		return send(&control.StatusResponse{Logs: []*control.VertexLog{entry}})
	}
	log, err := steplog.Open(filepath.Join(l.logsOf(ref), nameOf(entry.Vertex)))
	if errors.Is(err, fs.ErrNotExist) && l.cfg.MaxLogs > 0 {
		return missing(fmt.Errorf("it was removed, as the logs of builds may take %s (kiln.maxLogStorage)", units.BytesSize(float64(l.cfg.MaxLogs))))
	}
	if err != nil {
		return missing(err)
	}
	defer log.Close() //nolint:errcheck // it was read only
	part, size := &control.StatusResponse{}, 0
	for off := int64(0); ; {
		c, next, err := log.Next(off)
		if errors.Is(err, io.EOF) {
			break
		}
		var data []byte
		if err == nil {
			data, err = log.Data(c, c.Size)
		}
		if err != nil {
			return errors.Join(send(part), missing(err))
		}
		part.Logs = append(part.Logs, &control.VertexLog{Vertex: entry.Vertex, Stream: int64(c.Stream), Msg: data, Timestamp: timestamppb.New(c.Time)})
		if size += c.Size; size >= replayPart {
			if err := send(part); err != nil {
				return err
			}
			part, size = &control.StatusResponse{}, 0
		}
		off = next
	}
	if size == 0 {
		return nil
	}
	return send(part)
}
