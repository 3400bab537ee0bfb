package dockerfile

import (
	"errors"

	"github.com/moby/buildkit/frontend/dockerfile/shell"
)

// maxExpansion bounds what the variables of one word add up to. No process
// could be given more, and words that double others would soon fill memory.
const maxExpansion = 1 << 20

var errTooLong = errors.New("variables expand to more than 1 MiB")

// boundedEnv gives no more than that; what is beyond is empty.
type boundedEnv struct {
	shell.EnvGetter
	given int
}

func (e *boundedEnv) Get(key string) (string, bool) {
	v, ok := e.EnvGetter.Get(key)
	e.given += len(v)
	if e.given > maxExpansion {
		v = ""
	}
	return v, ok
}

// expandWord replaces the variables in word by their values in env.
func expandWord(lex *shell.Lex, word string, env shell.EnvGetter) (shell.ProcessWordResult, error) {
	bounded := &boundedEnv{EnvGetter: env}
	res, err := lex.ProcessWordWithMatches(word, bounded)
	if err == nil && (bounded.given > maxExpansion || len(res.Result) > len(word)+maxExpansion) {
		err = errTooLong
	}
	return res, err
}
