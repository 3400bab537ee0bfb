// Package remote is build cache as it is kept outside of the daemon: in a
// registry, in a directory, or inside an image. Its format is the protocol's,
// application/vnd.buildkit.cacheconfig.v0, so that caches go both ways between
// kiln and other BuildKit daemons.
//
//	build --Recorder--> Steps --Encode--> Config, blobs --WriteManifest--> ...
//	... --Parse--> Config, blobs --Index.Add--> Index, which a build asks
//
// A record of the format is one output of a step. Its digest names the op and
// the output, which is what solver.RootKey hashes; its inputs link to the records
// that lead to it, one list of alternatives for each input; its results are
// layers, lowest first, each with a parent. What identifies an input by content
// is a record without inputs, as sources are. So a record says what a link of the
// key graph says, and the same step has the same record wherever it ran.
//
// The package moves no bytes and knows no registries: package worker/remotecache
// does.
package remote

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"

	"github.com/kilnbuild/kiln/solver"
	"github.com/opencontainers/go-digest"
)

// ConfigType is the media type of a Config.
const ConfigType = "application/vnd.buildkit.cacheconfig.v0"

// Config is the format. Whatever else a document holds is ignored.
type Config struct {
	Layers  []Layer  `json:"layers,omitempty"`
	Records []Record `json:"records,omitempty"`
}

// Layer is a blob on top of another one.
type Layer struct {
	Blob   digest.Digest `json:"blob,omitempty"`
	Parent int           `json:"parent,omitempty"` // index of a layer, -1 for none
}

// Record is one output of a step.
type Record struct {
	Digest  digest.Digest `json:"digest,omitempty"`
	Inputs  [][]Link      `json:"inputs,omitempty"` // alternatives, by input
	Results []Result      `json:"layers,omitempty"`
	Chains  []Chain       `json:"chains,omitempty"`
}

// Link says which record is an input.
type Link struct {
	Selector string `json:"selector,omitempty"`
	Record   int    `json:"link"` // index
}

// Result is a layer with all of its parents.
type Result struct {
	Layer     int       `json:"layer"` // index
	CreatedAt time.Time `json:"createdat"`
}

// Chain is a result whose layers have other parents, lowest first.
type Chain struct {
	Layers    []int     `json:"layers"` // indexes
	CreatedAt time.Time `json:"createdat"`
}

// parseConfig decodes a config without checking what it says.
func parseConfig(data []byte) (c Config, err error) {
	if err := json.Unmarshal(data, &c); err != nil {
		return c, fmt.Errorf("the cache config isn't well-formed: %w", err)
	}
	return c, nil
}

// check verifies that every index is in range and that neither layers nor
// records go round in circles. It returns the records in an order in which each
// comes after its inputs.
func (c Config) check() (order []int, err error) {
	if err := c.checkLayers(); err != nil {
		return nil, err
	}
	for i, r := range c.Records {
		if err := c.checkRecord(r); err != nil {
			return nil, fmt.Errorf("cache record %d: %w", i, err)
		}
	}
	return c.sortRecords()
}

func (c Config) checkLayers() error {
	const walking, good = 1, 2
	state := make([]byte, len(c.Layers))
	for i := range c.Layers {
		var path []int
		for at := i; at != -1 && state[at] != good; at = c.Layers[at].Parent {
			if state[at] == walking {
				return fmt.Errorf("cache layer %d is its own ancestor", at)
			}
			if p := c.Layers[at].Parent; p < -1 || p >= len(c.Layers) {
				return fmt.Errorf("cache layer %d has the parent %d of %d", at, p, len(c.Layers))
			}
			state[at] = walking
			path = append(path, at)
		}
		for _, at := range path {
			state[at] = good
		}
	}
	return nil
}

func (c Config) checkRecord(r Record) error {
	if _, err := keyOf(r.Digest); err != nil {
		return err
	}
	for i, alternatives := range r.Inputs {
		if len(alternatives) == 0 {
			return fmt.Errorf("nothing leads to its input %d", i)
		}
		for _, l := range alternatives {
			if l.Record < 0 || l.Record >= len(c.Records) {
				return fmt.Errorf("its input %d is record %d of %d", i, l.Record, len(c.Records))
			}
		}
	}
	layers := func(list ...int) error {
		for _, l := range list {
			if l < 0 || l >= len(c.Layers) {
				return fmt.Errorf("its result is layer %d of %d", l, len(c.Layers))
			}
		}
		return nil
	}
	for _, res := range r.Results {
		if err := layers(res.Layer); err != nil {
			return err
		}
	}
	for _, chain := range r.Chains {
		if err := layers(chain.Layers...); err != nil {
			return err
		}
	}
	return nil
}

// sortRecords puts inputs first.
func (c Config) sortRecords() (order []int, err error) {
	waits := make([]int, len(c.Records)) // for so many links
	users := make([][]int, len(c.Records))
	for i, r := range c.Records {
		for _, alternatives := range r.Inputs {
			for _, l := range alternatives {
				waits[i]++
				users[l.Record] = append(users[l.Record], i)
			}
		}
		if waits[i] == 0 {
			order = append(order, i)
		}
	}
	for n := 0; n < len(order); n++ {
		for _, u := range users[order[n]] {
			if waits[u]--; waits[u] == 0 {
				order = append(order, u)
			}
		}
	}
	if len(order) < len(c.Records) {
		return nil, fmt.Errorf("%d cache records are, or stand on, their own inputs", len(c.Records)-len(order))
	}
	return order, nil
}

// keyOf is the key that a record's digest stands for.
func keyOf(d digest.Digest) (k solver.Key, err error) {
	if err := d.Validate(); err != nil {
		return k, fmt.Errorf("its digest %.100q: %w", d, err)
	}
	if d.Algorithm() != digest.SHA256 {
		return k, fmt.Errorf("its digest %.100q isn't one of sha256", d)
	}
	_, err = hex.Decode(k[:], []byte(d.Encoded()))
	return k, err
}

// digestOf is the digest that stands for k in a record.
func digestOf(k solver.Key) digest.Digest {
	return digest.NewDigestFromBytes(digest.SHA256, k[:])
}
