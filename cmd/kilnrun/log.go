//go:build linux && (amd64 || arm64)

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"
)

// entry is a line of a JSON log, as callers of runc read it.
type entry struct {
	Level string    `json:"level"`
	Msg   string    `json:"msg"`
	Time  time.Time `json:"time"`
}

// logError prints err, and appends it to the log file if there is one.
func logError(file, format string, err error) error {
	fmt.Fprintln(os.Stderr, "kilnrun:", err)
	if file == "" || file == os.Stderr.Name() {
		return nil
	}
	return appendLog("error", file, format, err)
}

// warn is told of what doesn't keep a command from being done. It goes to the log
// file; standard error, where there is none, may be the container's.
func warn(file, format string, err error) {
	if file != "" {
		lerr := appendLog("warning", file, format, err)
		if lerr == nil {
			return
		}
		err = errors.Join(err, lerr)
	}
	fmt.Fprintln(os.Stderr, "kilnrun:", err)
}

func appendLog(level, file, format string, err error) error {
	f, ferr := os.OpenFile(file, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if ferr != nil {
		return fmt.Errorf("write log: %w", ferr)
	}
	now := time.Now().UTC()
	if format == "json" {
		ferr = json.NewEncoder(f).Encode(entry{level, err.Error(), now})
	} else {
		_, ferr = fmt.Fprintf(f, "time=%q level=%s msg=%q\n", now.Format(time.RFC3339), level, err.Error())
	}
	if ferr = errors.Join(ferr, f.Close()); ferr != nil {
		return fmt.Errorf("write log: %w", ferr)
	}
	return nil
}
