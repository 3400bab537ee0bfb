//go:build linux

package network

import (
	"context"
	"log/slog"
)

// noneAhead is how many namespaces with loopback only are made ahead where steps
// have to ask for them, which few do. They are quickly made.
const noneAhead = 3

// none provides loopback.
type none struct{ pool *pool }

func openNone(cfg Config, log *slog.Logger) none {
	ahead := cfg.ahead()
	if cfg.Mode != None {
		ahead = min(ahead, noneAhead)
	}
	return none{newPool(poolConfig{
		make:  func(context.Context) (*Namespace, error) { return create(func(*Namespace) error { return nil }) },
		ahead: ahead, keep: remembered, makers: makers(), log: log,
	})}
}

func (n none) Take(ctx context.Context, u User) (*Namespace, error) { return n.pool.Take(ctx, u.Asks) }

func (n none) Close() error { return n.pool.Close() }
