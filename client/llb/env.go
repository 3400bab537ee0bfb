package llb

import "slices"

// EnvList is an immutable, ordered list of environment variables. The zero
// value is empty. A variable that is set again moves to the end.
type EnvList struct {
	vars []envVar
}

type envVar struct{ key, value string }

// AddOrReplace returns a list in which k has the value v.
func (e EnvList) AddOrReplace(k, v string) EnvList {
	vars := make([]envVar, 0, len(e.vars)+1)
	for _, ev := range e.vars {
		if ev.key != k {
			vars = append(vars, ev)
		}
	}
	return EnvList{append(vars, envVar{k, v})}
}

// SetDefault returns a list in which k has the value v unless it had one.
func (e EnvList) SetDefault(k, v string) EnvList {
	if _, ok := e.Get(k); ok {
		return e
	}
	return e.AddOrReplace(k, v)
}

// Delete returns a list without k.
func (e EnvList) Delete(k string) EnvList {
	return EnvList{slices.DeleteFunc(slices.Clone(e.vars), func(ev envVar) bool { return ev.key == k })}
}

// Get returns the value of k.
func (e EnvList) Get(k string) (string, bool) {
	for i := len(e.vars) - 1; i >= 0; i-- {
		if e.vars[i].key == k {
			return e.vars[i].value, true
		}
	}
	return "", false
}

// Keys returns the names in order.
func (e EnvList) Keys() []string {
	keys := make([]string, len(e.vars))
	for i, ev := range e.vars {
		keys[i] = ev.key
	}
	return keys
}

// ToArray returns the variables as name=value in order.
func (e EnvList) ToArray() []string {
	out := make([]string, len(e.vars))
	for i, ev := range e.vars {
		out[i] = ev.key + "=" + ev.value
	}
	return out
}
