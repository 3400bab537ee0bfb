package solver

// level is how much of an edge somebody wants, or has been told.
type level uint8

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
type status uint8

const (
	unresolved status = iota // asks for cache maps, keys and the results of inputs
	matching                 // waits for a lookup
	loading                  // loads a record
	executing                // its vertex runs
	done                     // has a result
	failed
)

func (s status) String() string {
	return [...]string{"unresolved", "matching", "loading", "executing", "done", "failed"}[s]
}
