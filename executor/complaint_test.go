package executor

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/kilnbuild/kiln/executor/native"
	"golang.org/x/sys/unix"
)

// What runtimes say of a program that can't be executed is told from what they
// say of other troubles, and from what programs print.
func TestStartErrors(t *testing.T) {
	const entry = `{"level":"error","msg":"runc run failed: unable to start container process: `
	for _, tc := range []struct {
		name, log, program string
		printed            []string
		code               int
		want               error // of an ExecError
		other              bool  // another error
	}{
		{name: "nothing", program: "x", code: 1},
		{name: "runc, not in PATH", log: entry + `exec: \"x\": executable file not found in $PATH"}`, program: "x", code: 1, want: native.ErrNotInPath},
		{name: "runc, no such file", log: entry + `exec: \"/x\": stat /x: no such file or directory"}`, program: "/x", code: 1, want: unix.ENOENT},
		{name: "runc, trouble", log: entry + `error mounting \"x\""}`, program: "x", code: 1, other: true},
		{name: "runc, attempt", printed: []string{"exec /x: exec format error"}, program: "/x", code: 1, want: unix.ENOEXEC},
		{name: "runc, attempt in PATH", printed: []string{"exec /bin/x: no such file or directory"}, program: "x", code: 1, want: unix.ENOENT},
		{name: "a program that talks like runc", printed: []string{"exec /y: exec format error"}, program: "/x", code: 1},
		{name: "a program that goes on", printed: []string{"exec /x: exec format error", "never mind"}, program: "/x", code: 1},
		{name: "a program with its own code", printed: []string{"exec /x: exec format error"}, program: "/x", code: 2},
		{name: "crun, not in PATH", log: "{\"msg\":\"executable file `x` not found in $PATH: No such file or directory\",\"level\":\"error\"}", program: "x", code: 1, want: native.ErrNotInPath},
		{name: "crun, no such file", log: "{\"msg\":\"executable file `/x` not found in $PATH: No such file or directory\",\"level\":\"error\"}", program: "/x", code: 1, want: unix.ENOENT},
		{name: "crun, a file in PATH", log: `{"msg":"open executable: Not a directory","level":"error"}`, program: "x", code: 1, want: native.ErrNotInPath},
		{name: "crun, mode", log: `{"msg":"open executable: Permission denied","level":"error"}`, program: "/x", code: 1, want: unix.EACCES},
		{name: "crun, attempt", printed: []string{"{\"msg\":\"exec container process (missing dynamic library?) `/x`: No such file or directory\",\"level\":\"error\"}"}, program: "/x", code: 1, want: unix.ENOENT},
		{name: "crun, attempt as text", printed: []string{"exec container process `/x`: Exec format error"}, program: "/x", code: 1, want: unix.ENOEXEC},
		{name: "crun, trouble", log: "{\"msg\":\"warned\",\"level\":\"warning\"}\n{\"msg\":\"mount `x`: No such device\",\"level\":\"error\"}", program: "x", code: 1, other: true},
		{name: "no log at all", log: "not JSON", program: "x", code: 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			log := filepath.Join(t.TempDir(), "log.json")
			if tc.log != "" {
				if err := os.WriteFile(log, []byte(tc.log+"\n"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			err := startError(log, tc.program, tc.printed, tc.code)
			exec, isExec := errors.AsType[*native.ExecError](err)
			switch {
			case tc.want != nil:
				if !isExec || exec.Err != tc.want || exec.Path != tc.program {
					t.Errorf("error %#v, want %v of %s", err, tc.want, tc.program)
				}
			case isExec, (err != nil) != tc.other:
				t.Errorf("error %v", err)
			}
		})
	}
}
