package keys

import "github.com/kilnbuild/kiln/solver"

// Contents returns for each input of the step that l describes the keys that lead
// from it to key whatever made the input, and that nothing leads to: of contents
// that the input had, and of sources that it was.
func (s *Store) Contents(key solver.Key, l solver.Lookup) [][]solver.Key {
	out := make([][]solver.Key, len(l.Inputs))
	input := map[string]int{}
	for i := range l.Inputs {
		input[tag(l, i, solver.InputKey{})] = i
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.scan(s.db, backs, string(key[:]), func(k string) bool {
		from, by := k[keyLen:2*keyLen], k[2*keyLen:]
		if i, ok := input[by]; ok && !s.any(s.db, backs, from) {
			out[i] = append(out[i], solver.Key([]byte(from)))
		}
		return true
	})
	return out
}
