package solver

// level is how much of an edge somebody wants, or has been told.
type level int

const (
	nothing   level = iota
	firstKeys       // the keys that are cheapest to know
	allKeys         // every key by definition
	theResult
)

func (l level) String() string {
	return [...]string{"nothing", "first keys", "all keys", "result"}[l]
}

// status is where an edge is on its way to a result.
type status int

const (
	unresolved status = iota // asks for cache maps and keys
	matching                 // waits for a lookup
	loading                  // loads a record
	waiting                  // waits for the results of inputs
	executing                // its vertex runs
	done                     // has a result
	failed
)

func (s status) String() string {
	return [...]string{"unresolved", "matching", "loading", "waiting", "executing", "done", "failed"}[s]
}
