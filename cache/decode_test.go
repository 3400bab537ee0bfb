package cache

import (
	"encoding/json"
	"math/rand/v2"
	"reflect"
	"testing"

	"github.com/kilnbuild/kiln/internal/plainjson"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// someRecord is one with some of its fields set.
func someRecord(rnd *rand.Rand) storedRecord {
	size := rnd.Int64N(1 << 50)
	full := storedRecord{
		Parents: []string{"a1", "b2"}, Layers: []string{"c3"}, Snap: "0zk1", Twin: "t", Mutable: true, Retain: true, Open: true,
		Desc: []string{"mkfile /f", "RUN a && b > \"c\" \\ d", "größe \u2028\n\t", "\xff\xfe"}[rnd.IntN(4)],
		Type: TypeRegular, Created: rnd.Int64() - rnd.Int64(), LastUsed: rnd.Int64N(1 << 62), Uses: rnd.IntN(9), Size: &size,
		DiffID: digest.FromString("d"), Blobs: []storedBlob{{ocispec.Descriptor{MediaType: "m", Size: 3, Annotations: map[string]string{"k": "}]"}}, true}},
		Index: map[string]string{"a{b": "c\"]d"}, Birth: "born",
	}
	from, to := reflect.ValueOf(&full).Elem(), reflect.ValueOf(&storedRecord{}).Elem()
	for i := range from.NumField() {
		if rnd.IntN(2) == 0 {
			to.Field(i).Set(from.Field(i))
		}
	}
	return to.Interface().(storedRecord)
}

// A record is read as encoding/json does, without that, and with whatever bytes are
// wrong.
func TestDecodeRecord(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 3000 {
		data, err := json.Marshal(someRecord(rnd))
		must(t, err)
		var plain storedRecord
		if !plainjson.Object(data, plain.set) {
			t.Errorf("%s isn't plain", data)
		}
		sameDecoded(t, data)
		for range 1 + rnd.IntN(3) {
			at := rnd.IntN(len(data))
			switch rnd.IntN(3) {
			case 0:
				data[at] = byte(rnd.IntN(256))
			case 1:
				data[at] = `{}[]",:\0-e.tn `[rnd.IntN(15)]
			default:
				data = append(data[:at:at], data[min(len(data), at+1+rnd.IntN(3)):]...)
			}
			if len(data) == 0 {
				break
			}
		}
		sameDecoded(t, data)
	}
}

func sameDecoded(t *testing.T, data []byte) {
	t.Helper()
	var got, want storedRecord
	gotErr, wantErr := decodeRecord(data, &got), json.Unmarshal(data, &want)
	if (gotErr == nil) != (wantErr == nil) || gotErr == nil && !reflect.DeepEqual(got, want) {
		t.Fatalf("%s:\n%+v, %v; want\n%+v, %v", data, got, gotErr, want, wantErr)
	}
}

func FuzzDecodeRecord(f *testing.F) {
	rnd := rand.New(rand.NewPCG(3, 4))
	for range 50 {
		data, err := json.Marshal(someRecord(rnd))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) { sameDecoded(t, data) })
}
