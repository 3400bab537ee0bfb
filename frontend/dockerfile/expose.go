package dockerfile

import (
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/linter"
)

func (st *step) expose(cmd *instructions.ExposeCommand) error {
	s := st.stage
	exposed := []string{}
	for _, word := range cmd.Ports {
		expanded, err := expandWord(st.lex, word, s.state.Env())
		if err != nil {
			return err
		}
		for _, spec := range expanded.Words {
			p, err := parsePorts(spec)
			if err != nil {
				return err
			}
			st.lintPorts(cmd, spec, p)
			exposed = append(exposed, p.list()...)
		}
	}
	if s.image.Config.ExposedPorts == nil {
		s.image.Config.ExposedPorts = map[string]struct{}{}
	}
	for _, p := range exposed {
		s.image.Config.ExposedPorts[p] = struct{}{}
	}
	s.history(fmt.Sprintf("EXPOSE %v", exposed), false)
	return nil
}

// ports is a range of ports, as EXPOSE and publishing name them:
// [[ip:]host:]first[-last][/proto]. EXPOSE has no use for ip and host.
type ports struct {
	ip, host    string
	first, last int
	proto       string // as written
}

func parsePorts(spec string) (p ports, err error) {
	container := spec
	if i := strings.LastIndexByte(spec, ':'); i >= 0 {
		p.host, container = spec[:i], spec[i+1:]
	}
	if i := strings.LastIndexByte(p.host, ':'); i >= 0 {
		p.ip, p.host = p.host[:i], p.host[i+1:]
	}
	container, p.proto, _ = strings.Cut(container, "/")
	switch strings.ToLower(p.proto) {
	case "":
		p.proto = "tcp"
	case "tcp", "udp", "sctp":
	default:
		return p, fmt.Errorf("invalid port: %q: invalid proto: %s", spec, p.proto)
	}
	if container == "" {
		return p, fmt.Errorf("invalid port: %q: no port specified", spec)
	}
	if err := checkIP(p.ip); err != nil {
		return p, fmt.Errorf("invalid port: %q: %w", spec, err)
	}
	if p.first, p.last, err = parseRange(container); err != nil {
		return p, fmt.Errorf("invalid containerPort: %s: %w", container, err)
	}
	if p.host == "" {
		return p, nil
	}
	first, last, err := parseRange(p.host)
	if err != nil {
		return p, fmt.Errorf("invalid hostPort: %s: %w", p.host, err)
	}
	if p.last != p.first && last-first != p.last-p.first {
		return p, fmt.Errorf("invalid ranges specified for container and host Ports: %s and %s", container, p.host)
	}
	return p, nil
}

func checkIP(ip string) error {
	if inner, ok := strings.CutPrefix(ip, "["); ok {
		ip, ok = strings.CutSuffix(inner, "]")
		if !ok {
			return fmt.Errorf("invalid IP address [%s", ip)
		}
	}
	if ip != "" && net.ParseIP(ip) == nil {
		return fmt.Errorf("invalid IP address: %s", ip)
	}
	return nil
}

func parseRange(s string) (first, last int, err error) {
	lo, hi, isRange := strings.Cut(s, "-")
	if first, err = parsePort(lo); err != nil {
		return 0, 0, fmt.Errorf("start port '%s': %w", lo, err)
	}
	if !isRange {
		return first, first, nil
	}
	if last, err = parsePort(hi); err != nil {
		return 0, 0, fmt.Errorf("end port '%s': %w", hi, err)
	}
	if last < first {
		return 0, 0, fmt.Errorf("port %d comes before %d", last, first)
	}
	return first, last, nil
}

func parsePort(s string) (int, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil {
		return 0, fmt.Errorf("not a number from 0 to 65535")
	}
	return int(n), nil
}

// list is every port as the image config names it.
func (p ports) list() []string {
	var out []string
	for n := p.first; n <= p.last; n++ {
		out = append(out, strconv.Itoa(n)+"/"+strings.ToLower(p.proto))
	}
	return out
}

func (st *step) lintPorts(cmd *instructions.ExposeCommand, spec string, p ports) {
	if rule := &linter.RuleExposeProtoCasing; p.proto != strings.ToLower(p.proto) {
		st.lint.Run(rule, cmd.Location(), rule.Format(spec))
	}
	if rule := &linter.RuleExposeInvalidFormat; p.ip != "" || p.host != "" {
		st.lint.Run(rule, cmd.Location(), rule.Format(spec))
	}
}
