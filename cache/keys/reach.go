package keys

// MadeOf returns id and the results of everything that was made of what hangs
// off its keys, as far as the graph knows: what may be wrong if id is.
func (s *Store) MadeOf(id string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := []string{id}
	known := map[string]bool{id: true}
	seen := map[string]bool{}
	work := s.keysOf(s.db, id)
	for len(work) > 0 {
		key := work[len(work)-1]
		work = work[:len(work)-1]
		if seen[key] {
			continue
		}
		seen[key] = true
		s.scan(s.db, links, key, func(k string) bool {
			next := k[keyLen+tagLen:]
			work = append(work, next)
			s.scan(s.db, results, next, func(k string) bool {
				if r := k[keyLen:]; !known[r] {
					known[r] = true
					out = append(out, r)
				}
				return true
			})
			return true
		})
	}
	return out
}

// keysOf returns the keys that the result hangs off.
func (s *Store) keysOf(in scanner, id string) (out []string) {
	s.scan(in, byID, id+"\x00", func(k string) bool {
		if len(k) == len(id)+1+keyLen { // else it is of a longer id
			out = append(out, k[len(id)+1:])
		}
		return true
	})
	return out
}
