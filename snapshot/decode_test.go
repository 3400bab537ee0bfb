package snapshot

import (
	"encoding/json"
	"math/rand/v2"
	"reflect"
	"testing"

	"github.com/kilnbuild/kiln/internal/plainjson"
)

// A record is read as encoding/json does, and without that.
func TestDecodeRecord(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	full := record{Parent: "p1", Layers: []string{"a", "b"}, Committed: true, At: 1234567890123456789, Form: formCopy, Deletes: true, Clears: true, Ground: true}
	for range 1000 {
		from, r := reflect.ValueOf(full), record{}
		for i := range from.NumField() {
			if rnd.IntN(2) == 0 {
				reflect.ValueOf(&r).Elem().Field(i).Set(from.Field(i))
			}
		}
		data := r.encode()
		var plain record
		if !plainjson.Object(data, plain.set) || !reflect.DeepEqual(plain, r) {
			t.Fatalf("%s: %+v", data, plain)
		}
		data[rnd.IntN(len(data))] = byte(rnd.IntN(128))
		var got, want record
		gotErr, wantErr := got.decode(data), json.Unmarshal(data, &want)
		if (gotErr == nil) != (wantErr == nil) || gotErr == nil && !reflect.DeepEqual(got, want) {
			t.Fatalf("%q: %+v, %v; want %+v, %v", data, got, gotErr, want, wantErr)
		}
	}
}
