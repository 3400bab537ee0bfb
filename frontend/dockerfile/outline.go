package dockerfile

import (
	"maps"
	"slices"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/solver/pb"
)

// outline gathers what a stage can be given: arguments, secrets and ssh agents.
type outline struct {
	args    map[string]argInfo // declared so far, with those of the base
	used    map[string]struct{}
	secrets map[string]need
	ssh     map[string]need
}

// argInfo is a declared argument. Deps are the arguments its default uses.
type argInfo struct {
	value      string
	definition instructions.KeyValuePairOptional
	deps       map[string]struct{}
	location   []parser.Range
}

// need is the first use of a secret or ssh agent.
type need struct {
	required bool
	location []parser.Range
}

func (o outline) clone() outline {
	return outline{
		args:    maps.Clone(o.args),
		used:    maps.Clone(o.used),
		secrets: maps.Clone(o.secrets),
		ssh:     maps.Clone(o.ssh),
	}
}

// declare notes an ARG within a stage.
func (o *outline) declare(arg instructions.KeyValuePairOptional, location []parser.Range) {
	if o.args == nil {
		o.args = map[string]argInfo{}
	}
	o.args[arg.Key] = argInfo{definition: arg, value: arg.ValueString(), location: location}
}

// use notes arguments, and those that their defaults use, as used.
func (o *outline) use(args map[string]struct{}) {
	if o.used == nil {
		o.used = map[string]struct{}{}
	}
	for k := range args {
		if _, ok := o.used[k]; ok {
			continue
		}
		o.used[k] = struct{}{}
		o.use(o.args[k].deps)
	}
}

func (o *outline) needSecret(id string, required bool, location []parser.Range) {
	noteNeed(&o.secrets, id, required, location)
}

func (o *outline) needSSH(id string, required bool, location []parser.Range) {
	noteNeed(&o.ssh, id, required, location)
}

func noteNeed(needs *map[string]need, id string, required bool, location []parser.Range) {
	if *needs == nil {
		*needs = map[string]need{}
	}
	if _, ok := (*needs)[id]; !ok {
		(*needs)[id] = need{required, location}
	}
}

// outlineResult is the answer to an outline request.
type outlineResult struct {
	Name        string          `json:"name,omitempty"`
	Description string          `json:"description,omitempty"`
	Args        []outlineArg    `json:"args,omitempty"`
	Secrets     []outlineSecret `json:"secrets,omitempty"`
	SSH         []outlineSecret `json:"ssh,omitempty"`
	Sources     [][]byte        `json:"sources,omitempty"`
}

type outlineArg struct {
	Name        string       `json:"name"`
	Description string       `json:"description,omitempty"`
	Value       string       `json:"value,omitempty"`
	Location    *pb.Location `json:"location,omitempty"`
}

type outlineSecret struct {
	Name     string       `json:"name"`
	Required bool         `json:"required,omitempty"`
	Location *pb.Location `json:"location,omitempty"`
}

// outlineOf joins what all stages that the target needs can be given. Where
// several say the same, the target's own word counts, then its base's.
func (c *conversion) outlineOf() outlineResult {
	r := outlineResult{
		Name:        c.result.src.Name,
		Description: c.result.src.DocComment,
		Sources:     [][]byte{c.file.Data},
	}
	args, secrets, ssh := map[string]bool{}, map[string]bool{}, map[string]bool{}
	seen := map[*stage]bool{}
	var visit func(s *stage)
	visit = func(s *stage) {
		if s == nil || seen[s] {
			return
		}
		seen[s] = true
		for _, k := range sortedKeys(s.outline.used) {
			info, ok := s.outline.args[k]
			if !ok || args[k] {
				continue
			}
			args[k] = true
			r.Args = append(r.Args, outlineArg{k, info.definition.DocComment, info.value, toLocation(info.location)})
		}
		r.Secrets = appendNeeds(r.Secrets, s.outline.secrets, secrets)
		r.SSH = appendNeeds(r.SSH, s.outline.ssh, ssh)
		visit(s.base)
		for _, d := range s.deps {
			visit(d.stage)
		}
	}
	visit(c.result)
	slices.SortStableFunc(r.Args, func(a, b outlineArg) int { return firstLine(a.Location) - firstLine(b.Location) })
	byLine := func(a, b outlineSecret) int { return firstLine(a.Location) - firstLine(b.Location) }
	slices.SortStableFunc(r.Secrets, byLine)
	slices.SortStableFunc(r.SSH, byLine)
	return r
}

func appendNeeds(out []outlineSecret, needs map[string]need, seen map[string]bool) []outlineSecret {
	for _, id := range sortedKeys(needs) {
		if !seen[id] {
			seen[id] = true
			out = append(out, outlineSecret{id, needs[id].required, toLocation(needs[id].location)})
		}
	}
	return out
}

func toLocation(ranges []parser.Range) *pb.Location {
	if len(ranges) == 0 {
		return nil
	}
	return &pb.Location{Ranges: toRanges(ranges)}
}

func firstLine(l *pb.Location) int {
	if l == nil || len(l.Ranges) == 0 {
		return 0
	}
	return int(l.Ranges[0].Start.Line)
}
