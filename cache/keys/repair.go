package keys

import (
	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/solver"
)

// Repair removes what Check reports: links and results that are known from one
// end only, results that don't exist, links that lead to none, and what is no entry. It returns
// how many entries it removed. Nothing else may use the store at the time.
func (s *Store) Repair(exists func(id string) bool) (removed int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	known := func(of kind, key string) bool {
		_, ok := s.get(entry{of, key})
		return ok
	}
	sound := map[kind]func(k string) bool{
		links:   func(k string) bool { return known(backs, k[keyLen+tagLen:]+k[:keyLen+tagLen]) },
		backs:   func(k string) bool { return known(links, k[keyLen:]+k[:keyLen]) },
		results: func(k string) bool { return known(byID, k[keyLen:]+"\x00"+k[:keyLen]) && exists(k[keyLen:]) },
		byID: func(k string) bool {
			id, key := k[:len(k)-keyLen-1], k[len(k)-keyLen:]
			return known(results, key+id) && exists(id)
		},
	}
	b := &store.Batch{}
	strays(s.db, func(bucket, key string) {
		removed++
		b.Delete(bucket, key)
	})
	s.db.Write(b)

	b = &store.Batch{}
	for of, ok := range sound {
		s.scan(s.db, of, "", func(k string) bool {
			if !ok(k) {
				removed++
				drop(b, entry{of, k})
			}
			return true
		})
	}
	s.db.Write(b)

	b = &store.Batch{}
	leads := s.leading()
	s.scan(s.db, links, "", func(k string) bool {
		in, key := k[:keyLen+tagLen], k[keyLen+tagLen:]
		if !leads[solver.Key([]byte(key))] {
			removed += 2
			drop(b, entry{links, k})
			drop(b, entry{backs, key + in})
		}
		return true
	})
	s.db.Write(b)
	return removed
}

// leading returns the keys that have a result, or from which links lead to one.
// It looks at the whole graph at once, which is quicker than asking key by key.
func (s *Store) leading() map[solver.Key]bool {
	from := map[solver.Key][]solver.Key{}
	s.scan(s.db, links, "", func(k string) bool {
		key := solver.Key([]byte(k[keyLen+tagLen:]))
		from[key] = append(from[key], solver.Key([]byte(k[:keyLen])))
		return true
	})
	leads := map[solver.Key]bool{}
	var todo []solver.Key
	add := func(key solver.Key) {
		if !leads[key] {
			leads[key] = true
			todo = append(todo, key)
		}
	}
	s.scan(s.db, results, "", func(k string) bool {
		add(solver.Key([]byte(k[:keyLen])))
		return true
	})
	for len(todo) > 0 {
		key := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for _, k := range from[key] {
			add(k)
		}
	}
	return leads
}
