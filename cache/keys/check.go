package keys

import (
	"fmt"

	"github.com/kilnbuild/kiln/solver"
)

// Counts are how much there is.
type Counts struct{ Links, Results int }

// Check verifies that every link is known from both ends and leads to a result
// at last, that every result is known from both ends and exists, and that nothing
// else is there.
func (s *Store) Check(exists func(id string) bool) (c Counts, problems []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	report := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	strays(s.db, func(bucket, key string) { report("%s %x is no entry of the key graph", bucket, key) })
	leads, dead := s.leading(), map[solver.Key]bool{}
	s.scan(s.db, links, "", func(k string) bool {
		c.Links++
		in, key := k[:keyLen+tagLen], k[keyLen+tagLen:]
		if _, ok := s.get(entry{backs, key + in}); !ok {
			report("key %x: the link from %x is not known at its end", key, in[:keyLen])
		}
		if end := solver.Key([]byte(key)); !leads[end] && !dead[end] {
			dead[end] = true
			report("key %s: links lead to it, but no result is found that way", end)
		}
		return true
	})
	s.scan(s.db, backs, "", func(k string) bool {
		key, in := k[:keyLen], k[keyLen:]
		if _, ok := s.get(entry{links, in + key}); !ok {
			report("key %x: the link from %x is known only at its end", key, in[:keyLen])
		}
		return true
	})
	s.scan(s.db, results, "", func(k string) bool {
		c.Results++
		key, id := k[:keyLen], k[keyLen:]
		if _, ok := s.get(entry{byID, id + "\x00" + key}); !ok {
			report("key %x: its result %s is not known by id", key, id)
		}
		if !exists(id) {
			report("key %x: its result %s does not exist", key, id)
		}
		return true
	})
	s.scan(s.db, byID, "", func(k string) bool {
		id, key := k[:len(k)-keyLen-1], k[len(k)-keyLen:]
		if _, ok := s.get(entry{results, key + id}); !ok {
			report("key %x: its result %s is known only by id", key, id)
		}
		return true
	})
	return c, problems
}
